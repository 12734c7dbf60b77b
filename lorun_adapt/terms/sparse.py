"""Sparse terms: a stage's tensor is the base plus the values of some of its entries, alone or beside a low-rank pair.

Files hold the values, and one bit for each entry that says whether it has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..disk.reading import Slot
from ..errors import LoRunError
from ..stages.fold import pair_size
from ..stages.stage_map import TensorSpec
from ..util.energy import TINY, root_mean_square
from ..util.numbers import double_of
from .factors import factorise, factorise_weighted, sum_of_products
from .term import Fitted, Setting, Term, Weighting

ITERATIONS = 10  # of choosing the entries and the base in turn
ROUNDS = 4  # of fitting the pairs and the sparse part in turn
BITS_OF_A_NUMBER = 32


class SparseConfig(LoraConfig):
    """A config for sparse terms, for ``convert(dun, SparseConfig(r=8))``.

    A sparse term of rank r holds as many numbers as a low-rank term of rank r. Scalings have no meaning for it.

    >>> from lorun_adapt import SparseConfig
    >>> SparseConfig(r=4).r
    4

    Args:
        r: the rank.
        low_rank: add a low-rank pair of the same rank, so that a term holds twice as many numbers.
        further: the other options of ``LoraConfig`` that :func:`lorun_adapt.convert` supports.

    Raises:
        LoRunError: an option for scalings.
    """

    def __init__(self, r: int = 8, low_rank: bool = False, **further: Any) -> None:
        for option in ("lora_alpha", "alpha_pattern", "use_rslora"):
            if option in further:
                raise LoRunError(f"a sparse term has no scaling: leave {option} out")
        super().__init__(r=r, lora_alpha=r, alpha_pattern=dict(further.get("rank_pattern") or {}), **further)
        self.peft_type = "LORA_AND_SPARSE" if low_rank else "SPARSE"


class _HoldsEntries(Term):
    """A term with the values of some entries, and their places."""

    values: nn.Parameter
    places: Tensor

    @property
    def rank(self) -> int:  # type: ignore[override]
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.places.nbytes

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {self.places.numel()} entries"


class Sparse(_HoldsEntries):
    """W_k = W_0 + S_k, where S_k is zero but for some entries.

    Args:
        values: (rank, rows + columns), the entries in the order of their places: as many numbers as a low-rank term of
            this rank has.
        places: (rank * (rows + columns),), where they are in the flattened tensor, in increasing order.
        rows: the rows of the folded tensor.

    >>> term = Sparse(torch.ones(1, 5), torch.arange(5), rows=2)
    >>> term(torch.zeros(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """

    def __init__(self, values: Tensor, places: Tensor, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.register_parameter("values", nn.Parameter(values.contiguous()))
        self.register_buffer("places", places.to(torch.int32))

    def forward(self, base: Tensor) -> Tensor:
        return _with_entries(base, self.values, self.places)

    def sizes_of_zeros(self, base: Tensor) -> dict[str, float]:
        return {} if self.values.any() else {"values": root_mean_square(base)}

    def pruned(self, rank: int, start: Sparse) -> Sparse:
        columns = self.values.shape[1] - self.rows
        return Sparse(*_kept_of(self, start, rank, self.rows * columns), self.rows)

    @classmethod
    def fit(
        cls,
        stages: Tensor,
        spec: TensorSpec,
        setting: Setting,
        *,
        weighting: Weighting | None = None,
        generator: torch.Generator | None = None,
    ) -> Fitted:
        """Choose the entries and the base in turn; an entry weighs as much as its row times its column."""
        count, exact = _count(spec, setting), stages.to(double_of(stages)).flatten(1)
        base, places = _base_and_places(exact, count, _weights(weighting, spec), spec.without_base)
        residual = exact - base
        terms = [
            cls(values.to(stages.dtype).view(setting.rank, -1), place, spec.matrix[0])
            if generator is None or bool(values.any())
            else cls.untrained(spec, setting, stages, generator)
            for values, place in zip(residual.gather(1, places), places)
        ]
        lost = residual.scatter(1, places, 0).abs().square().sum(1)
        return Fitted(base.to(stages.dtype).view(spec.shape), terms, lost)

    @classmethod
    def untrained(cls, spec: TensorSpec, setting: Setting, like: Tensor, generator: torch.Generator) -> Sparse:
        """Return a term of zeros at random places."""
        places = torch.randperm(spec.numel, generator=generator, device=generator.device)[: _count(spec, setting)]
        values = torch.zeros(setting.rank, sum(spec.matrix), dtype=like.dtype, device=like.device)
        return cls(values, places.sort().values.to(like.device), spec.matrix[0])

    @classmethod
    def weighted_sum(cls, terms: Sequence[Sparse], weights: Sequence[float]) -> Sparse:
        """Return the largest entries of the weighted sum, as many as the largest of the terms has."""
        rows, width = terms[0].rows, terms[0].values.shape[1]
        dense = torch.zeros(rows * (width - rows), dtype=terms[0].values.dtype, device=terms[0].values.device)
        for term, weight in zip(terms, weights):
            dense = _with_entries(dense, weight * term.values.detach(), term.places)
        rank = max(term.rank for term in terms)
        places = _largest(dense.abs()[None], rank * width)[0]
        return cls(dense[places].view(rank, width), places, rows)

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        return pair_size(spec.matrix, rank) + math.ceil(spec.numel / BITS_OF_A_NUMBER)

    @classmethod
    def highest_rank(cls, spec: TensorSpec) -> int:
        return max(1, spec.numel // sum(spec.matrix))

    @classmethod
    def file_slots(cls, spec: TensorSpec) -> dict[str, Slot]:
        rows, columns = spec.matrix
        bits = Slot((rows, math.ceil(columns / 8)), torch.uint8)
        return {"values": Slot((None, rows + columns), spec.dtype), "bits": bits}

    def file_tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "bits": _packed(self.places, self.rows, self.values.shape[1] - self.rows)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> Sparse:
        values, bits = tensors["values"], tensors["bits"]
        places = _unpacked(bits, values.shape[1] - len(bits))
        if len(places) != values.numel():
            raise LoRunError(
                f"expected places for the {values.numel()} values of a sparse term, found {len(places)}: the file is "
                "damaged; download it again"
            )
        return cls(values, places, len(bits))


class LowRankAndSparse(_HoldsEntries):
    """W_k = W_0 + B_k A_k + S_k: a low-rank pair and a sparse part of the same rank.

    Args:
        a: (rank, columns).
        b: (rows, rank).
        values, places: as for :class:`Sparse`.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: Tensor, b: Tensor, values: Tensor, places: Tensor) -> None:
        super().__init__()
        for name, tensor in (("a", a), ("b", b), ("values", values)):
            self.register_parameter(name, nn.Parameter(tensor.contiguous()))
        self.register_buffer("places", places.to(torch.int32))

    def forward(self, base: Tensor) -> Tensor:
        return _with_entries((base + (self.b @ self.a).view_as(base)).to(base.dtype), self.values, self.places)

    def sizes_of_zeros(self, base: Tensor) -> dict[str, float]:
        size = root_mean_square(base)
        directions = min(len(self.b), self.a.shape[1])  # as for a low-rank term
        of_b = {} if self.b.any() else {"b": size / max(root_mean_square(self.a), TINY) / directions**0.5}
        return of_b | ({} if self.values.any() else {"values": size})

    def pruned(self, rank: int, start: LowRankAndSparse) -> LowRankAndSparse:
        """Return a term of a lower rank; the pair is that of ``start``, cut by SVD."""
        b, a = start.b[:, :rank].detach(), start.a[:rank].detach()
        if start.b.any():  # otherwise an SVD would give zeros for both, which do not train
            b, a = sum_of_products([(1.0, start.b, start.a)], rank)
        entries = _kept_of(self, start, rank, len(self.b) * self.a.shape[1])
        return LowRankAndSparse(a.to(self.a), b.to(self.b), *entries)

    @classmethod
    def fit(
        cls,
        stages: Tensor,
        spec: TensorSpec,
        setting: Setting,
        *,
        weighting: Weighting | None = None,
        generator: torch.Generator | None = None,
    ) -> Fitted:
        """Fit the base with the pairs, and the entries of what is left, in turn."""
        exact, rank = stages.to(double_of(stages)).reshape(len(stages), *spec.matrix), setting.rank
        count, weights = _count(spec, setting), _weights(weighting, spec)
        entries = torch.zeros_like(exact)
        for _ in range(ROUNDS):
            if weighting is None:
                factors = factorise(exact - entries, rank, spec.without_base)
            else:
                factors = factorise_weighted(exact - entries, rank, *weighting, spec.without_base)
            residual = (exact - factors.base - factors.b @ factors.a).flatten(1)
            places = _largest(residual.abs() * weights, count)
            entries = torch.zeros_like(residual).scatter(1, places, residual.gather(1, places)).view_as(exact)
        values = residual.gather(1, places).to(stages.dtype).view(len(stages), rank, -1)
        fitted = [cls(*parts) for parts in zip(factors.a.to(stages), factors.b.to(stages), values, places)]
        terms = [
            cls.untrained(spec, setting, stages, generator)
            if generator is not None and not bool((term.b @ term.a).any())
            else term
            for term in fitted
        ]
        lost = residual.scatter(1, places, 0).abs().square().sum(1)
        return Fitted(factors.base.to(stages.dtype).reshape(spec.shape), terms, lost)

    @classmethod
    def untrained(
        cls, spec: TensorSpec, setting: Setting, like: Tensor, generator: torch.Generator
    ) -> LowRankAndSparse:
        """Return a term with zero B and random A, as LoRA's, and zeros at random places."""
        sparse = Sparse.untrained(spec, setting, like, generator)
        rows, columns = spec.matrix
        a = torch.empty(setting.rank, columns, device=generator.device)
        a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        return cls(a.to(like), torch.zeros(rows, setting.rank).to(like), sparse.values.detach(), sparse.places)

    @classmethod
    def weighted_sum(cls, terms: Sequence[LowRankAndSparse], weights: Sequence[float]) -> LowRankAndSparse:
        """Return the weighted sum of the pairs, cut by SVD, and the largest entries of that of the sparse parts."""
        products = [(weight, term.b, term.a) for weight, term in zip(weights, terms)]
        b, a = sum_of_products(products, max(term.rank for term in terms))
        sparse = Sparse.weighted_sum([Sparse(t.values.detach(), t.places, len(t.b)) for t in terms], weights)
        return cls(a.to(terms[0].a), b.to(terms[0].b), sparse.values.detach(), sparse.places)

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        return pair_size(spec.matrix, rank) + Sparse.size(spec, rank)

    @classmethod
    def highest_rank(cls, spec: TensorSpec) -> int:
        return min(*spec.matrix, Sparse.highest_rank(spec))

    @classmethod
    def file_slots(cls, spec: TensorSpec) -> dict[str, Slot]:
        rows, columns = spec.matrix
        pair = {"a": Slot((None, columns), spec.dtype), "b": Slot((rows, None), spec.dtype)}
        return pair | Sparse.file_slots(spec)

    def file_tensors(self) -> dict[str, Tensor]:
        bits = _packed(self.places, len(self.b), self.a.shape[1])
        return {"a": self.a, "b": self.b, "values": self.values, "bits": bits}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> LowRankAndSparse:
        sparse = Sparse.from_file(tensors)
        if not len(sparse.values) == len(tensors["a"]) == tensors["b"].shape[1]:
            raise LoRunError("the parts of a term differ in rank: the file is damaged; download it again")
        return cls(tensors["a"], tensors["b"], sparse.values.detach(), sparse.places)


def _with_entries(base: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """``base``, with values added at places of the flattened tensor."""
    if torch.compiler.is_compiling():
        places = places.long()  # ONNX has no others
    return base.reshape(-1).index_add(0, places, values.reshape(-1).to(base.dtype)).view(base.shape)


def _kept_of(term: _HoldsEntries, start: _HoldsEntries, rank: int, numel: int) -> tuple[Tensor, Tensor]:
    """The numbers that ``start`` has where ``term`` has its largest, as many as ``rank`` has, and their places."""
    chosen = _largest(term.values.detach().abs().flatten()[None], rank * term.values.shape[1])[0]
    places = term.places[chosen]
    dense = _with_entries(start.values.new_zeros(numel), start.values.detach(), start.places)
    return dense[places].view(rank, -1), places


def _count(spec: TensorSpec, setting: Setting) -> int:
    """How many entries a term of a rank has.

    Raises:
        LoRunError: the tensor has fewer, or the setting has a scaling.
    """
    if setting.scaling != 1:
        raise LoRunError(f"a sparse term has no scaling, found {setting.scaling:g} for {spec.name!r}: use SparseConfig")
    if (count := pair_size(spec.matrix, setting.rank)) > spec.numel:
        raise LoRunError(
            f"{spec.name!r} has {spec.numel} entries, too few for a sparse term of rank {setting.rank}, which has "
            f"{count}: leave it out of the targets"
        )
    return count


def _weights(weighting: Weighting | None, spec: TensorSpec) -> Tensor:
    """The roots of the weights of a tensor's entries, (N, rows * columns), or (1, 1) for equal ones."""
    if weighting is None:
        return torch.ones(1, 1)
    rows, columns = (torch.diagonal(part, dim1=1, dim2=2).real for part in (weighting.rows, weighting.columns))
    both = (rows[:, :, None] * columns[:, None, :]).expand(-1, *spec.matrix).flatten(1).double()
    return (both + weighting.damping * both.mean()).clamp_min(0).sqrt()


def _largest(sizes: Tensor, count: int) -> Tensor:
    """The places of the largest numbers in each row, in increasing order."""
    return sizes.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _base_and_places(stages: Tensor, count: int, weights: Tensor, without_base: bool) -> tuple[Tensor, Tensor]:
    """The base (E,) and the places (N, count) of the entries of N tensors (N, E) that leave the smallest residuals."""
    base = torch.zeros_like(stages[0]) if without_base else stages.mean(0)
    places = _largest((stages - base).abs() * weights, count)
    for _ in range(0 if without_base else ITERATIONS):
        rest = torch.ones(stages.shape, dtype=torch.bool, device=stages.device).scatter(1, places, False)
        number = rest.sum(0)
        base = torch.where(number > 0, (stages * rest).sum(0) / number.clamp_min(1), base)
        before, places = places, _largest((stages - base).abs() * weights, count)
        if torch.equal(before, places):
            break
    return base, places


def _packed(places: Tensor, rows: int, columns: int) -> Tensor:
    """The places as bits, (rows, columns / 8 rounded up), eight of a row in each number, the first one lowest."""
    width = 8 * math.ceil(columns / 8)
    kept = torch.zeros(rows, width, dtype=torch.uint8, device=places.device)
    places = places.long()
    kept[places // columns, places % columns] = 1
    powers = 2 ** torch.arange(8, device=places.device)
    return (kept.view(rows, -1, 8) * powers).sum(2).to(torch.uint8)


def _unpacked(bits: Tensor, columns: int) -> Tensor:
    """The places that :func:`_packed` packed; bits beyond a row's columns do not count."""
    kept = (bits[:, :, None].int() >> torch.arange(8, device=bits.device)) & 1
    return kept.flatten(1)[:, :columns].flatten().nonzero().flatten()
