"""One denoiser's adapter as the tensors and the ``LoraConfig`` that PEFT reads.

Where PEFT can represent the stage, ``PeftModel.from_pretrained(base_denoiser, folder)`` gives that
stage's denoiser. Where it can't, the config carries a rank of 0, at which PEFT raises, so that no
folder loads there as something else than it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..network.adapter import StageAdapter, lowrank_terms, private_tensors
from ..stages.stage_map import Group, TensorSpec
from ..terms.lowrank import LowRank
from ..util.modules import tensor_of
from .limits import CONVOLUTIONS, PREFIX, PeftView, peft_layer, peft_view
from .options import REFUSED


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

    private = private_tensors(adapter)
    terms = {
        name: LowRank(rounded(term.lora_A), rounded(term.lora_B), term.scaling)
        for name, term in lowrank_terms(adapter).items()
    }
    specs = {spec.name: Names(denoiser, spec) for spec in group.tensors if spec.name in terms}
    keys = {names.key: terms[name] for name, names in specs.items()}
    rest, exact = dict(private), set()
    for layer in view.full:
        spec = next(spec for spec in group.tensors if spec.name == f"{layer}.weight")
        base = rounded(tensor_of(denoiser, spec.name))
        specs[spec.name], keys[layer] = Names(denoiser, spec), _whole(spec, rounded(private[spec.name] - base))
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
        if dtype is not None or torch.equal(bias_of(base, difference, term.scaling), value):
            del rest[f"{key}.bias"]  # else kept as well, to the bit: PEFT passes over it
    for name in terms.keys() & {f"{key}.weight" for key in view.whole}:
        rest[name] = terms[name](rounded(tensor_of(denoiser, name)))
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


class Names:
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


def bias_of(base: Tensor, difference: Tensor, scaling: float) -> Tensor:
    return base + difference.to(base) * scaling
