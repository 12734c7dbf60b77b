"""What to try where no stages are found: single layers in lists, and parameters outside modules."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

CONTAINERS = {nn.Sequential, nn.ModuleList, nn.ModuleDict}


def hint_on_layers(dun: nn.Module) -> str | None:
    """Return what to do about stages that are single layers, or no modules at all; None if there are none of these.

    >>> lista = nn.Module()
    >>> lista.W = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    >>> hint_on_layers(lista)
    "W holds single layers; if these are the stages, pass stages=['W.*']"
    >>> lista.W = nn.ParameterList(nn.Parameter(layer.weight) for layer in lista.W)
    >>> hint_on_layers(lista)
    'W is a list of parameters, and stages must be modules: put those of each stage into a module'
    """
    layers = [path for path, module in dun.named_modules() if _holds_layers(module)]
    if layers:
        patterns, are = [f"{path}.*" for path in layers], "holds" if len(layers) == 1 else "hold"
        return f"{', '.join(layers)} {are} single layers; if these are the stages, pass stages={patterns}"
    for path, module in dun.named_modules():
        if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and len(module) > 1:
            return f"{path} is a list of parameters, and stages must be modules: put those of each stage into a module"
    return None


def _holds_layers(module: nn.Module) -> bool:
    """Whether it is a list of layers of torch, of one kind."""
    kinds = {type_before_parametrizations(child) for child in module.children()} - CONTAINERS
    one_kind = len(kinds) == 1 and all(kind.__module__.startswith("torch.nn.modules") for kind in kinds)
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1 and one_kind
