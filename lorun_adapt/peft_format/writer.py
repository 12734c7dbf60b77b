"""Write the adapter of one denoiser as the tensors and the ``LoraConfig`` that PEFT reads.

If PEFT can represent the stage, ``PeftModel.from_pretrained(base_denoiser, folder)`` returns that stage's denoiser. If
not, the config has a rank of 0, so that PEFT raises an error instead of loading something else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..network.adapter import StageAdapter, private_tensors, terms_of
from ..stages.stage_map import Group, TensorSpec
from ..terms.registry import LORA, TERMS
from ..terms.term import LoraFactors
from ..util.modules import tensor_of
from .limits import PeftView, peft_view
from .lora import PREFIX, FactorNames, bias_name, bias_of
from .options import REFUSED


@dataclass(frozen=True)
class StageFiles:
    """The contents of a stage's folder.

    Attributes:
        tensors: by their names in the file.
        exact: names of the tensors that must keep their dtype, because the file holds them in a second form.
        config: PEFT's config.
        problem: the reason why PEFT cannot represent the stage; None if it can.
    """

    tensors: dict[str, Tensor]
    exact: frozenset[str]
    config: LoraConfig
    problem: str | None


def write(
    denoiser: nn.Module,
    first: nn.Module,
    group: Group,
    adapter: StageAdapter,
    dtype: torch.dtype | None,
    refused: str | None = None,
) -> StageFiles:
    """Return the adapter in PEFT's format.

    Args:
        denoiser: the stage's denoiser in the base; biases are stored as differences from its biases.
        first: the denoiser that PEFT uses as the base.
        group: the denoiser's group.
        adapter: the adapter to write.
        dtype: the dtype in which floating-point tensors will be stored. Tensors that the file holds in two forms are
            computed from the values rounded to it.
        refused: a reason for PEFT to refuse the files, whatever the stage is.
    """
    view = peft_view(denoiser, first, group, adapter, refused)

    def rounded(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype).to(tensor.dtype)

    private, terms = private_tensors(adapter), terms_of(adapter)
    specs = {spec.name: spec for spec in group.tensors}
    names: dict[str, FactorNames] = {}
    factors: dict[str, LoraFactors] = {}  # by layer or tensor, as in a file
    tensors: dict[str, Tensor] = {}
    for name in [name for name in specs if name in terms]:
        lora = terms[name].as_lora()
        if lora is None:
            tensors |= {f"{PREFIX}{name}.{part}": value for part, value in terms[name].file_tensors().items()}
            continue
        names[name] = FactorNames(denoiser, specs[name])
        factors[names[name].key] = LoraFactors(rounded(lora.a), rounded(lora.b), lora.scaling)
    rest, exact = dict(private), set()
    for layer in view.full:
        spec = specs[f"{layer}.weight"]
        base = rounded(tensor_of(denoiser, spec.name))
        names[spec.name] = FactorNames(denoiser, spec)
        factors[layer] = _full_rank(spec, rounded(private[spec.name] - base))
        if dtype is not None:
            rest[spec.name] = _product(factors[layer], base)
            exact.add(PREFIX + spec.name)
    for layer_names in names.values():
        lora = factors[layer_names.key]
        for file_name, factor, shape in (
            (layer_names.a, lora.a, layer_names.a_shape),
            (layer_names.b, lora.b, layer_names.b_shape),
        ):
            tensors[file_name] = factor.reshape([len(lora.a) if side is None else side for side in shape])
    with_bias = any(f"{key}.bias" in private for key in view.targets)
    for key in view.targets if with_bias else ():
        lora, of_base = factors[key], denoiser.get_submodule(key).bias
        if not isinstance(of_base, Tensor) or f"{key}.bias" not in private:  # lora_bias applies to all layers or none
            tensors[bias_name(key)] = lora.b.new_zeros(lora.b.shape[0])
            continue
        of_base, value = rounded(of_base), private[f"{key}.bias"]
        difference = tensors[bias_name(key)] = rounded((value - of_base) / lora.scaling)
        if dtype is not None or torch.equal(bias_of(of_base, difference, lora.scaling), value):
            del rest[f"{key}.bias"]  # otherwise also stored exactly, since the sum is rounded; PEFT ignores it
    for name in terms.keys() & {f"{key}.weight" for key in view.whole}:
        rest[name] = _product(factors[names[name].key], rounded(tensor_of(denoiser, name)))
        exact.add(PREFIX + name)
    tensors.update({PREFIX + name: value for name, value in rest.items()})
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return StageFiles(detached, frozenset(exact), _config(factors, view, with_bias), view.problem)


def _product(factors: LoraFactors, base: Tensor) -> Tensor:
    """Return the stage's tensor."""
    return TERMS[LORA].from_lora(factors)(base)


def _full_rank(spec: TensorSpec, difference: Tensor) -> LoraFactors:
    """Return a difference from the base as factors of full rank."""
    (rows, columns), matrix = spec.matrix, difference.reshape(spec.matrix)
    if rows <= columns:
        return LoraFactors(matrix, torch.eye(rows).to(matrix))
    return LoraFactors(torch.eye(columns).to(matrix), matrix)


def _config(factors: Mapping[str, LoraFactors], view: PeftView, with_bias: bool) -> LoraConfig:
    kinds = Counter((len(lora.a), _alpha(lora)) for lora in factors.values())
    (rank, alpha), _ = kinds.most_common(1)[0] if kinds else ((1, 1), 0)
    ranks = {"^" + re.escape(key): len(lora.a) for key, lora in factors.items() if len(lora.a) != rank}
    alphas = {"^" + re.escape(key): _alpha(lora) for key, lora in factors.items() if _alpha(lora) != alpha}
    if view.problem is not None:
        ranks = {REFUSED: 0, **ranks}
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # PEFT declares an int but accepts any number
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_bias=with_bias,
        target_modules="|".join(re.escape(key) for key in sorted(factors.keys() - view.whole)) or "^$",
        modules_to_save=list(view.saved) or None,
        inference_mode=True,
    )


def _alpha(factors: LoraFactors) -> int | float:
    """Return the alpha that, divided by the rank, gives exactly the scaling."""
    rank = len(factors.a)
    alpha = rank * factors.scaling
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if candidate / rank == factors.scaling:
            alpha = candidate
            break
    return int(alpha) if alpha == int(alpha) else alpha
