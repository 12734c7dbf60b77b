"""What a network must be to be shared: stages built alike, with finite weights that their modules hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from ..errors import LoRunError
from ..util.copying import REGISTERED, tensors_beside_modules
from ..util.modules import has_valid_values, tensors_of
from .locations import Location, any_inside
from .stage_map import abridged

REMOVED_BY = {  # class of the hook that computes a weight -> what makes it an ordinary parameter
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
}


def check_alike(dun: nn.Module, locations: Sequence[Location], where: str) -> None:
    """Check that ``locations``, given in ``where``, can be the stages of one group.

    Raises:
        LoRunError: there are fewer than two, one appears twice or inside another, or their tensors differ in name,
            shape or dtype.
        AttributeError: there is no such module.
    """
    names = [path for path, _ in locations]
    if len(locations) < 2:
        raise LoRunError(
            f"expected two or more stages in {where}, found {', '.join(names) or 'none'}: name them all, or give the "
            "number of calls of the module with calls="
        )
    if any_inside(locations, locations) or len(set(locations)) < len(locations):
        raise LoRunError(
            f"the stages in {where} are not separate, as one appears twice or inside another among {abridged(names)}: "
            "name the outer or the inner ones"
        )
    first = {name: (tuple(t.shape), t.dtype) for name, t, _ in tensors_of(dun.get_submodule(names[0]))}
    if not first:
        raise LoRunError(f"{names[0]}, a stage in {where}, has no parameters: name other modules")
    for other in names[1:]:
        here = {name: (tuple(t.shape), t.dtype) for name, t, _ in tensors_of(dun.get_submodule(other))}
        for name in (*first, *here):
            if first.get(name) != here.get(name):
                raise LoRunError(
                    f"expected stages of equal shape in {where}, found tensor {name!r} with "
                    f"{_text_of(first.get(name))} in {names[0]} and {_text_of(here.get(name))} in {other}: name only "
                    "stages that are built alike"
                )


def _text_of(shape_and_dtype: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if shape_and_dtype is None else f"{shape_and_dtype[0]} of {shape_and_dtype[1]}"


def check_plain(dun: nn.Module) -> None:
    """Check that the network consists of modules of Python, with weights.

    Raises:
        LoRunError: it is no module, or a part of it is TorchScript or lazy.
    """
    if not isinstance(dun, nn.Module):
        raise LoRunError(f"expected a network, found {type(dun).__name__}: pass the nn.Module")
    for name, module in dun.named_modules():
        where = name or type(dun).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise LoRunError(
                f"{where} is TorchScript, whose modules cannot be changed: convert the network before torch.jit.script "
                "or torch.jit.trace"
            )
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) for tensor in tensors):
            raise LoRunError(f"{where} is lazy, without weights yet: run the network once, then load its weights")


def check_parameters(dun: nn.Module, stages: Iterable[str]) -> None:
    """Check that the stages' weights are ordinary parameters, with names that files can hold.

    Raises:
        LoRunError: a weight is computed in each forward, by weight_norm, spectral_norm or another parametrization; a
            module holds an adapter already, or has a slash in a name.
    """
    for stage in dict.fromkeys(stages):
        for name, module in dun.get_submodule(stage).named_modules():
            where = f"{stage}.{name}".rstrip(".")
            hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            hook = next((kind for kind in hooks if kind in REMOVED_BY), None)
            if hook is not None or parametrize.is_parametrized(module):
                parametrized = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
                raise LoRunError(
                    f"expected ordinary weights in {where}, found {hook or 'a parametrization'}: remove it first, with "
                    f"{REMOVED_BY.get(hook or '', parametrized)}"
                )
            names = (*module._modules, *module._parameters, *module._buffers)
            if any(name.startswith(("lora_", "lorun_")) for name in names):
                raise LoRunError(f"{where} holds the parts of an adapter already: call merge_and_unload() first")
            if any("/" in name for name in names):
                raise LoRunError(f"expected names without a slash, found {names!r} in {where}: rename the module")


def check_reachable(dun: nn.Module, stages: Iterable[str]) -> None:
    """Check that the stages hold all their modules and parameters where an adapter can reach them.

    Raises:
        LoRunError: one is in a Python list, a function or another object that a module keeps as an attribute.
    """
    for stage in dict.fromkeys(stages):
        own = {id(parameter) for parameter in dun.get_submodule(stage).parameters()}
        for name, module in dun.get_submodule(stage).named_modules():
            if (attribute := _hidden_tensors(module, own)) is not None:
                where = f"{stage}.{name}".rstrip(".")
                raise LoRunError(
                    f"{where} keeps parameters in the attribute {attribute!r}, where an adapter cannot reach them: use "
                    "nn.ModuleList, nn.ParameterList or a method instead"
                )


def check_dense(dun: nn.Module) -> None:
    """Check that all tensors are dense and have values.

    Raises:
        LoRunError: a tensor is sparse, or on the meta device.
    """
    for name, tensor, _ in tensors_of(dun):
        if tensor.is_meta or tensor.layout != torch.strided:
            raise LoRunError(
                f"expected a dense tensor with values, found {'no values' if tensor.is_meta else tensor.layout} in "
                f"{name!r} of {type(dun).__name__}: build the network dense, on the CPU"
            )


def check_finite(dun: nn.Module) -> None:
    """Check that all weights are finite.

    Raises:
        LoRunError: a tensor holds NaN, or a parameter Inf.
    """
    for name, tensor, buffer in tensors_of(dun):
        if not has_valid_values(tensor.detach(), buffer):
            raise LoRunError(
                f"expected finite weights, found NaN or Inf in {name!r} of {type(dun).__name__}: load weights that are "
                "not damaged"
            )


def _hidden_tensors(module: nn.Module, own: Collection[int]) -> str | None:
    """The name of an attribute through which a forward would read parameters, where no module registers them.

    Args:
        module: the module with the attributes.
        own: the ids of the stage's parameters. An adapter replaces these, which a list or a function would not see.
    """
    for name, value in vars(module).items():
        if name in REGISTERED or (name.startswith("_") and type(module).__module__.startswith("torch.nn.")):
            continue  # recurrent layers, for example, keep a second list of their weights
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(item, nn.Parameter) for item in items):
            return name
        if any(id(tensor) in own for tensor in tensors_beside_modules(value)):
            return name
    return None
