"""One denoiser's adapter as the tensors and the ``LoraConfig`` that PEFT reads and writes.

Where PEFT can represent the stage, ``PeftModel.from_pretrained(base_denoiser, folder)`` gives that
stage's denoiser. Where it can't, the config carries a rank of 0, at which PEFT raises, so that no
folder loads there as something else than it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .assemble import StageAdapter, lowrank_terms, private_tensors
from .errors import LoRunError
from .lowrank import LowRank
from .stages import Group

PREFIX = "base_model.model."
REFUSED = ".*"  # rank_pattern's key for a rank of 0
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def write(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> tuple[dict[str, Tensor], LoraConfig, str | None]:
    """The adapter's tensors by PEFT's names, its config, and why PEFT can't represent it, if so.

    ``denoiser`` holds the base's values: PEFT keeps a stage's bias as what it adds to the base's.
    """
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    tensors: dict[str, Tensor] = {}
    layers = {}
    for name, term in terms.items():
        layer = _layer(denoiser, name)
        a, b, key = term.lora_A, term.lora_B, name
        if layer is not None:
            key = name.removesuffix(".weight")
            layers[key] = term
            if isinstance(layer, CONVOLUTIONS):
                a = a.reshape(a.shape[0], *layer.weight.shape[1:])
                b = b.reshape(*b.shape, *(1 for _ in layer.kernel_size))
        tensors[f"{PREFIX}{key}.lora_A.weight"] = a
        tensors[f"{PREFIX}{key}.lora_B.weight"] = b
    with_bias = any(f"{key}.bias" in private for key in layers)
    rest = dict(private)
    if with_bias:
        for key, term in layers.items():
            base = denoiser.get_submodule(key).bias
            if base is None:  # lora_bias is for all layers or none
                tensors[f"{PREFIX}{key}.lora_B.bias"] = term.lora_B.new_zeros(term.lora_B.shape[0])
                continue
            value = private[f"{key}.bias"]
            difference = (value - base) / term.scaling
            tensors[f"{PREFIX}{key}.lora_B.bias"] = difference
            if torch.equal(_bias(base, difference, term.scaling), value):
                del rest[f"{key}.bias"]  # else kept as well, to the bit: PEFT passes over it
    tensors.update({PREFIX + name: value for name, value in rest.items()})
    saved = _modules_to_save(denoiser, rest, layers, with_bias)
    problem = peft_problem(denoiser, group, adapter)
    config = _config(terms, layers, with_bias, saved or [], problem)
    return {name: t.detach() for name, t in tensors.items()}, config, problem


def peft_problem(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> str | None:
    """Why PEFT can't represent the stage; None where it can."""
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    layers = {name.removesuffix(".weight"): term for name, term in terms.items() if _layer(denoiser, name) is not None}
    strange = [name for name in terms if _layer(denoiser, name) is None]
    if strange:
        return f"the tensor {strange[0]} is adapted, which is not the weight of a layer that PEFT adapts"
    if not layers:
        return "the stage has no low-rank term"
    if any(len(spec.aliases) > 1 for spec in group.tensors):
        return "the stage ties tensors within itself"
    with_bias = any(f"{key}.bias" in private for key in layers)
    rest = {n: t for n, t in private.items() if not (with_bias and n.endswith(".bias") and n[:-5] in layers)}
    if _modules_to_save(denoiser, rest, layers, with_bias) is None:
        return "the stage has private tensors that PEFT's modules_to_save can't name by themselves"
    return None


def read(
    tensors: Mapping[str, Tensor], config: LoraConfig, denoiser: nn.Module, group: Group, where: str
) -> StageAdapter:
    """The adapter that ``tensors`` hold for a denoiser of ``group``.

    Raises:
        LoRunError: a missing, an extra or a mis-shaped tensor.
    """
    left = dict(tensors)
    parameters = dict(denoiser.named_parameters(remove_duplicate=False))
    terms, private = {}, {}
    for spec in group.tensors:
        if spec.common:
            continue
        layer = _layer(denoiser, spec.name)
        key = spec.name.removesuffix(".weight") if layer is not None else spec.name
        like = parameters.get(spec.name)
        a, b = left.pop(f"{PREFIX}{key}.lora_A.weight", None), left.pop(f"{PREFIX}{key}.lora_B.weight", None)
        if a is not None and b is not None and like is not None:
            rows, columns = spec.matrix
            if a.shape[0] < 1 or a.numel() != a.shape[0] * columns or b.numel() != rows * a.shape[0]:
                raise LoRunError(
                    f"expected a low-rank pair for {spec.name!r} of shape {spec.shape}, found {tuple(a.shape)} and "
                    f"{tuple(b.shape)} in {where}: load it into the network it was made for"
                )
            terms[spec.name] = LowRank(
                a.reshape(-1, columns).to(like), b.reshape(rows, -1).to(like), _scaling(config, key, a.shape[0])
            )
            no_bias = layer is not None and layer.bias is None and left.get(f"{PREFIX}{key}.lora_B.bias")
            if isinstance(no_bias, Tensor) and not bool(no_bias.any()):
                del left[f"{PREFIX}{key}.lora_B.bias"]
            continue
        value = left.pop(PREFIX + spec.name, None)
        module = spec.name.removesuffix(".bias")
        difference = left.pop(f"{PREFIX}{module}.lora_B.bias", None) if spec.name.endswith(".bias") else None
        if value is None and difference is not None:
            rank = tensors[f"{PREFIX}{module}.lora_A.weight"].shape[0]
            value = _bias(denoiser.get_submodule(module).bias.detach(), difference, _scaling(config, module, rank))
        if value is None or value.shape != spec.shape:
            found = "nothing" if value is None else tuple(value.shape)
            raise LoRunError(
                f"expected {spec.name!r} of shape {spec.shape}, found {found} in {where}: the file is for "
                "another network or damaged"
            )
        value = value.to(spec.dtype if like is None else like.dtype).to(next(iter(denoiser.parameters())).device)
        private[spec.name] = value if spec.buffer else nn.Parameter(value, value.is_floating_point())
    if left:
        raise LoRunError(
            f"expected only the denoiser's tensors, found {sorted(left)[0]!r} in {where}: the file is for "
            "another network or damaged"
        )
    return StageAdapter(terms, private, [spec.name for spec in group.tensors if spec.frozen])


def _layer(denoiser: nn.Module, name: str) -> nn.Module | None:
    """The layer whose weight ``name`` is, if PEFT's LoRA does to it what we do."""
    path, _, attribute = name.rpartition(".")
    module = denoiser.get_submodule(path)
    if attribute != "weight" or not path:
        return None
    if type(module) is nn.Linear:
        return module
    if type(module) in CONVOLUTIONS and module.groups == 1 and module.padding_mode == "zeros":
        return module if all(step == 1 for step in module.dilation) else None
    return None


def _modules_to_save(
    denoiser: nn.Module, rest: Mapping[str, Tensor], layers: Mapping[str, LowRank], with_bias: bool
) -> list[str] | None:
    """Whole modules that hold the private tensors, where PEFT's matching by suffix finds just these."""
    owners = {name.rpartition(".")[0] for name in rest}
    owners -= {key for key in layers if with_bias and f"{key}.bias" in rest}
    names = [name for name, _ in denoiser.named_modules(remove_duplicate=False)]
    for owner in owners:
        module = denoiser.get_submodule(owner)
        if not owner or any(True for _ in module.children()):
            return None
        if not all(f"{owner}.{name}" in rest for name in module.state_dict()):
            return None
        if {name for name in names if name.endswith(owner)} - owners:
            return None
        if any(re.match(rf"(^|.*\.){owner}($|\..*)", key) for key in layers):
            return None
    return sorted(owners)


def _config(
    terms: Mapping[str, LowRank], layers: Mapping[str, LowRank], with_bias: bool, saved: list[str], problem: str | None
) -> LoraConfig:
    kinds = Counter((term.rank, term.rank * term.scaling) for term in terms.values())
    (rank, alpha), _ = kinds.most_common(1)[0] if kinds else ((1, 1.0), 0)
    keys = {key if (key := name.removesuffix(".weight")) in layers else name: term for name, term in terms.items()}
    ranks = {"^" + re.escape(key): term.rank for key, term in keys.items() if term.rank != rank}
    alphas = {
        "^" + re.escape(key): _number(term.rank * term.scaling)
        for key, term in keys.items()
        if term.rank * term.scaling != alpha
    }
    if problem is not None:
        ranks = {REFUSED: 0, **ranks}
    return LoraConfig(
        r=rank,
        lora_alpha=_number(alpha),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_bias=with_bias,
        target_modules="|".join(re.escape(key) for key in sorted(keys)) or "^$",
        modules_to_save=saved or None,
        inference_mode=True,
    )


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _scaling(config: LoraConfig, key: str, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _bias(base: Tensor, difference: Tensor, scaling: float) -> Tensor:
    return base + difference.to(base) * scaling
