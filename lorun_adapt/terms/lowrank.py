"""The low-rank term of LoRA, W_k = W_0 + scaling * B_k A_k, for tensors of any shape, folded to a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..disk.reading import Slot
from ..stages.fold import pair_size
from ..stages.stage_map import TensorSpec
from ..util.energy import root_mean_square
from .factors import factorise, factorise_weighted, sum_of_products
from .term import Fitted, LoraFactors, Setting, Term, Weighting


class LowRank(Term):
    """The low-rank term of one tensor of one stage.

    The forward reads the scaling from a tensor, since ``torch.compile`` would recompile for each new number.

    Args:
        lora_A: (rank, columns), where (rows, columns) is the shape of the folded tensor.
        lora_B: (rows, rank).
        scaling: PEFT's scaling.

    >>> import torch
    >>> from lorun_adapt.terms.lowrank import LowRank
    >>> term = LowRank(torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
    >>> term(torch.zeros(2, 3)).sum().item()
    3.0
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    factor: Tensor | None

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_parameter("lora_A", nn.Parameter(lora_A.contiguous()))
        self.register_parameter("lora_B", nn.Parameter(lora_B.contiguous()))
        self.scaling = scaling
        self.register_buffer("factor", self._factor(), persistent=False)

    def _factor(self) -> Tensor | None:
        like = self.lora_B
        return None if self.scaling == 1 else torch.tensor(self.scaling, dtype=like.dtype, device=like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        super()._apply(fn, recurse)
        self.factor = self._factor()  # as exact as the new dtype allows, and after to_empty() there is no other value
        return self

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.lora_A.shape[0]

    def forward(self, base: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            try:  # bypass nn.Module.__getattr__, since this runs for every tensor of every stage
                held = self._parameters
                return _sum(base, held["lora_A"], held["lora_B"], self._buffers["factor"])  # type: ignore[arg-type]
            except KeyError:  # replicas of nn.DataParallel hold their tensors as plain attributes
                pass
        return _sum(base, self.lora_A, self.lora_B, self.factor)

    def product(self) -> tuple[Tensor, Tensor]:
        return (self.lora_B if self.factor is None else self.lora_B * self.factor), self.lora_A

    def sizes_of_zeros(self, base: Tensor) -> dict[str, float]:
        """The size of B at which the term has the fraction rank / min(rows, columns) of the base's energy."""
        if self.lora_B.any() or not self.lora_A.any():
            return {}
        directions = min(len(self.lora_B), self.lora_A.shape[1])
        of_a = self.scaling * root_mean_square(self.lora_A) * math.sqrt(directions)
        return {"lora_B": root_mean_square(base) / of_a}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, matrix=({self.lora_B.shape[0]}, {self.lora_A.shape[1]}), scaling={self.scaling:g}"

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
        matrices = stages.reshape(len(stages), *spec.matrix)
        if weighting is None:
            factors = factorise(matrices, setting.rank, spec.without_base)
        else:
            factors = factorise_weighted(matrices, setting.rank, *weighting, spec.without_base)
        terms = [
            cls(a.to(stages.dtype), (b / setting.scaling).to(stages.dtype), setting.scaling)
            if generator is None or bool((b @ a).any())
            else cls.untrained(spec, Setting(factors.rank, setting.scaling), stages, generator)
            for a, b in zip(factors.a, factors.b)
        ]
        return Fitted(factors.base.to(stages.dtype).reshape(spec.shape), terms, factors.error)

    @classmethod
    def lost(cls, stages: Tensor, spec: TensorSpec, setting: Setting) -> Tensor:
        return factorise(stages.reshape(len(stages), *spec.matrix), setting.rank, spec.without_base).error

    @classmethod
    def untrained(cls, spec: TensorSpec, setting: Setting, like: Tensor, generator: torch.Generator) -> LowRank:
        """Return a term with zero B and, as in PEFT, random A (Kaiming uniform)."""
        rows, columns = spec.matrix
        bound = 1 / math.sqrt(columns)
        a = torch.empty(min(setting.rank, rows, columns), columns, device=generator.device)
        a.uniform_(-bound, bound, generator=generator)
        b = torch.zeros(rows, len(a), dtype=like.dtype, device=like.device)
        return cls(a.to(like), b, setting.scaling)

    @classmethod
    def weighted_sum(cls, terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """Return the weighted sum, truncated by SVD to the largest rank of the terms."""
        products = [(weight * term.scaling, term.lora_B, term.lora_A) for weight, term in zip(weights, terms)]
        b, a = sum_of_products(products, max(term.rank for term in terms))
        return cls(a.to(terms[0].lora_A), b.to(terms[0].lora_B))

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        return pair_size(spec.matrix, rank)

    @classmethod
    def highest_rank(cls, spec: TensorSpec) -> int:
        return min(spec.matrix)

    @classmethod
    def file_slots(cls, spec: TensorSpec) -> dict[str, Slot]:
        rows, columns = spec.matrix
        return {"lora_A": Slot((None, columns), spec.dtype), "lora_B": Slot((rows, None), spec.dtype)}

    def as_lora(self) -> LoraFactors:
        return LoraFactors(self.lora_A, self.lora_B, self.scaling)

    @classmethod
    def from_lora(cls, factors: LoraFactors) -> LowRank:
        return cls(*factors)


def _sum(base: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        b = b * factor
    product = torch.mm(b, a)  # under autocast, in another dtype; asking for autocast would take longer than this
    if product.dtype is base.dtype and base.is_contiguous() and not base.is_meta:
        return product.view_as(base).add_(base)
    # The sum must keep the dtype and memory layout of the base, which add_ in place on the product would not.
    return (base + product.view_as(base)).to(base.dtype)
