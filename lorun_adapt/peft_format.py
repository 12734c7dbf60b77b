"""One denoiser's adapter as the tensors and the ``LoraConfig`` that PEFT reads and writes.

Where PEFT can represent the stage, ``PeftModel.from_pretrained(base_denoiser, folder)`` gives that
stage's denoiser. Where it can't, the config carries a rank of 0, at which PEFT raises, so that no
folder loads there as something else than it is.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .assemble import StageAdapter, lowrank_terms, private_tensors
from .errors import LoRunError
from .lowrank import LowRank
from .peft_config import REFUSED
from .peft_limits import CONVOLUTIONS, PREFIX, PeftView, layer_problem, peft_layer, peft_view
from .reading import Slot
from .stages import Group, TensorSpec, is_sound

USUAL_RANKS = 256  # up to here a file's rank may be above all sides of the network's matrices


@dataclass(frozen=True)
class Written:
    """What goes into a stage's folder."""

    tensors: dict[str, Tensor]
    exact: frozenset[str]  # tensors that must keep their dtype: another tensor in the file says the same
    config: LoraConfig
    problem: str | None  # why PEFT can't represent the stage


def write(
    denoiser: nn.Module, first: nn.Module, group: Group, adapter: StageAdapter, dtype: torch.dtype | None
) -> Written:
    """The adapter by PEFT's names.

    Args:
        denoiser: the stage's, with the base's values: PEFT keeps a bias as what is added to the base's.
        first: the one that PEFT gets as the base.
        dtype: what floating-point tensors are to be stored as; what is told in two ways is told of
            the rounded ones.
    """
    view = peft_view(denoiser, first, group, adapter)

    def rounded(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype).to(tensor.dtype)

    private = {name: rounded(tensor) for name, tensor in private_tensors(adapter).items()}
    terms = {
        name: LowRank(rounded(term.lora_A), rounded(term.lora_B), term.scaling)
        for name, term in lowrank_terms(adapter).items()
    }
    specs = {spec.name: _Names(denoiser, spec) for spec in group.tensors if spec.name in terms}
    keys = {names.key: terms[name] for name, names in specs.items()}
    rest, exact = dict(private), set()
    for layer in view.full:
        spec = next(spec for spec in group.tensors if spec.name == f"{layer}.weight")
        base = rounded(_parameter(denoiser, spec.name))
        specs[spec.name], keys[layer] = _Names(denoiser, spec), _whole(spec, rounded(private[spec.name] - base))
        if dtype is not None:
            rest[spec.name] = keys[layer](base)
            exact.add(PREFIX + spec.name)
    tensors: dict[str, Tensor] = {}
    for names in specs.values():
        term = keys[names.key]
        for name, factor, shape in ((names.a, term.lora_A, names.a_shape), (names.b, term.lora_B, names.b_shape)):
            tensors[name] = factor.reshape([term.rank if side is None else side for side in shape])
    with_bias = any(f"{key}.bias" in private for key in view.targets)
    for key in view.targets if with_bias else ():
        term, base = keys[key], denoiser.get_submodule(key).bias
        if base is None or f"{key}.bias" not in private:  # lora_bias is for all layers or none
            tensors[f"{PREFIX}{key}.lora_B.bias"] = term.lora_B.new_zeros(term.lora_B.shape[0])
            continue
        base, value = rounded(base), private[f"{key}.bias"]
        difference = tensors[f"{PREFIX}{key}.lora_B.bias"] = rounded((value - base) / term.scaling)
        if dtype is not None or torch.equal(_bias(base, difference, term.scaling), value):
            del rest[f"{key}.bias"]  # else kept as well, to the bit: PEFT passes over it
    for name in terms.keys() & {f"{key}.weight" for key in view.whole}:
        rest[name] = terms[name](rounded(_parameter(denoiser, name)))
        exact.add(PREFIX + name)
    tensors.update({PREFIX + name: value for name, value in rest.items()})
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return Written(detached, frozenset(exact), _config(keys, view, with_bias), view.problem)


def _whole(spec: TensorSpec, difference: Tensor) -> LowRank:
    """A difference from the base as factors of full rank."""
    (rows, columns), matrix = spec.matrix, difference.reshape(spec.matrix)
    if rows <= columns:
        return LowRank(matrix, torch.eye(rows).to(matrix))
    return LowRank(torch.eye(columns).to(matrix), matrix)


def _parameter(denoiser: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(denoiser.get_submodule(path), attribute)


def slots(denoiser: nn.Module, group: Group) -> dict[str, Slot]:
    """What a file may hold for a denoiser of ``group``: by name, the shape and dtype."""
    found: dict[str, Slot] = {}
    for spec in group.tensors:
        if spec.common:
            continue
        found[PREFIX + spec.name] = Slot(spec.shape, spec.dtype)
        if spec.adaptable:
            names = _Names(denoiser, spec)
            found[names.a], found[names.b] = Slot(names.a_shape, spec.dtype), Slot(names.b_shape, spec.dtype)
            if names.layer is not None:
                found[names.bias] = Slot((spec.shape[0],), spec.dtype)
    return found


def highest_rank(group: Group) -> int:
    """What a file's ranks may be: more than a tensor's limit, as PEFT allows it, but within reason."""
    return max([USUAL_RANKS, *(max(spec.matrix) for spec in group.tensors if spec.adaptable)])


def read(
    tensors: Mapping[str, Tensor], config: LoraConfig, denoiser: nn.Module, first: nn.Module, group: Group, where: str
) -> StageAdapter:
    """The adapter that ``tensors``, which fit :func:`slots`, hold for a denoiser of ``group``.

    ``denoiser`` holds the base's values. What an adapter of PEFT's own neither targets nor saves
    stays as in the base. A rank above a tensor's limit is brought down to it, with a warning; the
    product stays the same.

    Raises:
        LoRunError: a missing or an extra tensor, a rank that the config doesn't say, NaN or Inf; a
            denoiser to which PEFT's layers do something else than their factors to its weights.
    """
    left, wanted = dict(tensors), _Wanted(config)
    terms: dict[str, LowRank] = {}
    private: dict[str, Tensor] = {}

    def fail(expected: str, found: str) -> LoRunError:
        return LoRunError(
            f"expected {expected}, found {found} in {where}: load it into the network it was made for, or download "
            "it again"
        )

    own = {spec.name for spec in group.tensors if not spec.common}
    for spec in group.tensors:
        if spec.common:
            continue
        names = _Names(denoiser, spec)
        base = names.owner._buffers[names.attribute] if spec.buffer else names.owner._parameters[names.attribute]
        assert base is not None
        pair = [left.pop(name) for name in (names.a, names.b) if spec.adaptable and name in left]
        if len(pair) == 1:
            raise fail(f"both factors of {spec.name!r}", "one")
        # Where a file has factors and the whole tensor, one is PEFT's way of seeing the other.
        if pair and (wanted.saved(spec) or PREFIX + spec.name not in left):
            left.pop(PREFIX + spec.name, None)
            rank = wanted.rank(names.key)
            found = [factor.shape[side.index(None)] for factor, side in zip(pair, (names.a_shape, names.b_shape))]
            if found != [rank, rank]:
                raise fail(f"factors of rank {rank} for {spec.name!r}, as its config says", f"ranks {found}")
            terms[spec.name] = _term(spec, pair, wanted.scaling(names.key, rank), base, where)
            lacking = names.bias if names.layer is not None and f"{names.key}.bias" not in own else None
            if lacking in left and bool(left.pop(lacking).any()):
                raise fail(f"no bias for {names.key!r}, which has none of its own", "one")
            continue
        if names.layer is not None and not pair and wanted.targets(names.key) and not wanted.saved(spec):
            raise fail(f"the factors of {spec.name!r}, which the config targets", "none")
        value = left.pop(PREFIX + spec.name, None)
        layer = spec.name.removesuffix(".bias")
        if layer != spec.name and f"{PREFIX}{layer}.lora_A.weight" in tensors:
            difference = left.pop(f"{PREFIX}{layer}.lora_B.bias", None)
            if value is None and difference is not None:
                value = _bias(base.detach(), difference, wanted.scaling(layer, wanted.rank(layer)))
            if value is None and wanted.lora_bias:
                raise fail(f"the bias of {layer!r}, since the config says lora_bias", "none")
        if value is None and (wanted.everything or wanted.saved(spec)):
            raise fail(f"the tensor {spec.name!r}", "none")
        value = base.detach().clone() if value is None else value.to(base)
        if not is_sound(value, spec.buffer):
            raise fail(f"finite numbers in {spec.name!r}", "NaN or Inf")
        trains = value.is_floating_point() or value.is_complex()
        private[spec.name] = value if spec.buffer else nn.Parameter(value, trains)
    if left:
        raise fail(f"the tensors that the config says of {group.name!r}", f"{sorted(left)[0]!r} beside them")
    if not wanted.everything:  # PEFT reads it
        tied = [
            spec.name for spec in group.tensors if len(spec.aliases) > 1 and (spec.name in terms or wanted.saved(spec))
        ]
        layers = {name.rpartition(".")[0] for name in terms}
        problem = f"{tied[0]!r} is tied" if tied else layer_problem(denoiser, first, layers)
        if problem is not None:
            raise fail(f"a denoiser to which PEFT's layers do what is done here ({problem})", "an adapter of PEFT's")
    return StageAdapter(terms, private, [spec.name for spec in group.tensors if spec.frozen])


def _term(spec: TensorSpec, pair: Sequence[Tensor], scaling: float, base: Tensor, where: str) -> LowRank:
    rows, columns = spec.matrix
    a, b = pair[0].reshape(-1, columns), pair[1].reshape(rows, -1)
    limit = min(rows, columns)
    if len(a) > limit:
        warnings.warn(
            f"rank {len(a)} is above the limit of {spec.name!r} in {where}: {limit} is used, for the same product",
            stacklevel=2,
        )
        exact = torch.complex128 if base.is_complex() else torch.float64
        product = b.to(exact) @ a.to(exact)
        a, b = (product, torch.eye(rows)) if rows <= columns else (torch.eye(columns), product)
    term = LowRank(a.to(base), b.to(base), scaling)
    if not all(is_sound(tensor, False) for tensor in (term.lora_A, term.lora_B, torch.tensor(scaling).to(base))):
        raise LoRunError(
            f"expected finite factors and scaling for {spec.name!r}, found NaN or Inf in {where}: download it again, "
            "or save one from before training diverged"
        )
    return term


class _Names:
    """How a file names a tensor: the layer's name where PEFT has a LoRA for it, else the tensor's own."""

    def __init__(self, denoiser: nn.Module, spec: TensorSpec) -> None:
        path, _, self.attribute = spec.name.rpartition(".")
        self.owner = denoiser.get_submodule(path)
        self.layer = peft_layer(denoiser, spec.name)
        self.key = spec.name if self.layer is None else path
        self.a, self.b, self.bias = (f"{PREFIX}{self.key}.lora_{x}" for x in ("A.weight", "B.weight", "B.bias"))
        rows, columns = spec.matrix
        self.a_shape: tuple[int | None, ...] = (None, columns)
        self.b_shape: tuple[int | None, ...] = (rows, None)
        if isinstance(self.layer, CONVOLUTIONS):
            self.a_shape, self.b_shape = (None, *spec.shape[1:]), (rows, None, *(1 for _ in spec.shape[2:]))


class _Wanted:
    """What a file must hold, by its config, and the numbers that the config has for each tensor."""

    def __init__(self, config: LoraConfig) -> None:
        self.everything = config.rank_pattern.get(REFUSED) == 0  # ours, and not for PEFT
        self.config = copy.copy(config)
        self.config.rank_pattern = {key: r for key, r in config.rank_pattern.items() if (key, r) != (REFUSED, 0)}
        self.lora_bias = config.lora_bias

    def rank(self, key: str) -> int:
        pattern = self.config.rank_pattern
        return pattern.get(get_pattern_key(pattern.keys(), key), self.config.r)

    def scaling(self, key: str, rank: int) -> float:
        pattern = self.config.alpha_pattern
        alpha = pattern.get(get_pattern_key(pattern.keys(), key), self.config.lora_alpha)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        return self.config.target_modules is not None and bool(check_target_module_exists(self.config, module))

    def saved(self, spec: TensorSpec) -> bool:
        """Whether modules_to_save names a module with the tensor, by PEFT's rule: its name ends so."""
        for alias in spec.aliases:
            parts = alias.split(".")[:-1]
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if any(name.endswith(saved) for saved in self.config.modules_to_save or ()):
                    return True
        return False


def _config(keys: Mapping[str, LowRank], view: PeftView, with_bias: bool) -> LoraConfig:
    kinds = Counter((term.rank, _alpha(term)) for term in keys.values())
    (rank, alpha), _ = kinds.most_common(1)[0] if kinds else ((1, 1), 0)
    ranks = {"^" + re.escape(key): term.rank for key, term in keys.items() if term.rank != rank}
    alphas = {"^" + re.escape(key): _alpha(term) for key, term in keys.items() if _alpha(term) != alpha}
    if view.problem is not None:
        ranks = {REFUSED: 0, **ranks}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_bias=with_bias,
        target_modules="|".join(re.escape(key) for key in sorted(keys.keys() - view.whole)) or "^$",
        modules_to_save=list(view.saved) or None,
        inference_mode=True,
    )


def _alpha(term: LowRank) -> int | float:
    """The alpha that gives the term's scaling back, to the bit, when it is divided by the rank."""
    alpha = term.rank * term.scaling
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if candidate / term.rank == term.scaling:
            alpha = candidate
            break
    return int(alpha) if alpha == int(alpha) else alpha


def _bias(base: Tensor, difference: Tensor, scaling: float) -> Tensor:
    return base + difference.to(base) * scaling
