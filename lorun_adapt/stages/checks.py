"""What a network must be to be shared: plain, finite weights that modules hold."""

from __future__ import annotations

import types
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import LoRunError
from ..util.modules import has_valid_values, tensors_of

WAYS_OUT = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
}


def check_parameters(dun: nn.Module, stages: Iterable[str]) -> None:
    """Refuse stages whose weights are made anew in each forward, or hold what files have names for.

    Raises:
        LoRunError: weight_norm, spectral_norm or another parametrization; an adapter; a slash in a
            name; lazy modules.
    """
    for stage in dict.fromkeys(stages):
        for name, module in dun.get_submodule(stage).named_modules():
            where = f"{stage}.{name}".rstrip(".")
            hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            made = next((kind for kind in hooks if kind in WAYS_OUT), None)
            if made is not None or parametrize.is_parametrized(module):
                parametrized = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
                raise LoRunError(
                    f"expected plain weights in {where}, found {made or 'a parametrization'}: bake it in first, with "
                    f"{WAYS_OUT.get(made or '', parametrized)}"
                )
            names = (*module._modules, *module._parameters, *module._buffers)
            if any(name in ("lora_A", "lora_B") or name.startswith("lorun_") for name in names):
                raise LoRunError(
                    f"expected a plain network, found the parts of an adapter in {where}: call merge_and_unload() first"
                )
            if any("/" in name for name in names):
                raise LoRunError(f"expected names without a slash, found {names!r} in {where}: rename the module")
            if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module.parameters(recurse=False)):
                raise LoRunError(f"expected weights in {where}, found a lazy module: run the network once, then load")


def check_reachable(dun: nn.Module, stages: Iterable[str]) -> None:
    """Refuse stages that hold modules or parameters where an adapter can't reach them.

    Raises:
        LoRunError: parameters in plain attributes.
    """
    for stage in dict.fromkeys(stages):
        for name, module in dun.get_submodule(stage).named_modules():
            if (attribute := _hidden_tensors(module)) is not None:
                where = f"{stage}.{name}".rstrip(".")
                raise LoRunError(
                    f"expected modules and parameters in {where}, found them in the plain attribute {attribute!r}, "
                    "where an adapter can't reach them: use nn.ModuleList, nn.ParameterList or a method instead"
                )


def check_dense(dun: nn.Module) -> None:
    """Refuse tensors that can't be shared or stored.

    Raises:
        LoRunError: a tensor on the meta device, or a sparse one.
    """
    for name, tensor, _ in tensors_of(dun):
        if tensor.is_meta or tensor.layout != torch.strided:
            raise LoRunError(
                f"expected a dense tensor with values, found {'no values' if tensor.is_meta else tensor.layout} in "
                f"{name!r} of {type(dun).__name__}: build it on the CPU, dense"
            )


def check_finite(dun: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        LoRunError: NaN, or Inf in a parameter.
    """
    for name, tensor, buffer in tensors_of(dun):
        if not has_valid_values(tensor.detach(), buffer):
            raise LoRunError(
                f"expected finite weights, found NaN or Inf in {name!r} of {type(dun).__name__}: take a checkpoint "
                "that is not damaged"
            )


def _hidden_tensors(module: nn.Module) -> str | None:
    """An attribute through which a forward would read parameters past the module that owns them."""
    for name, value in vars(module).items():
        if isinstance(value, (list, tuple, dict)) and not name.startswith("_"):
            items = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, nn.Parameter) for item in items):
                return name
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
        if any(isinstance(cell, (nn.Module, nn.Parameter)) for cell in cells):
            return name
    return None


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False
