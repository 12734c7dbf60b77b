"""Modules and their tensors: names, and where a tensor is held."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from .numbers import is_numeric


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put ``network`` into evaluation mode within the block, and each module back into its own mode afterwards.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     print(layer.training)
    False
    >>> layer.training
    True
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unchanged(networks: Iterable[nn.Module], but: Iterable[Tensor] = ()) -> Iterator[None]:
    """After the block, restore the parameters and buffers of ``networks``, except the values of those in ``but``.

    >>> layer = nn.BatchNorm1d(2)
    >>> with unchanged([layer], [layer.weight]):
    ...     _ = layer(torch.rand(3, 2)), nn.init.zeros_(layer.weight)
    >>> layer.running_mean, layer.weight.detach()
    (tensor([0., 0.]), tensor([0., 0.]))
    """
    changing = {id(tensor) for tensor in but}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tensors, dict(tensors))
        for network in networks
        for module in network.modules()
        for tensors in (module._parameters, module._buffers)
    ]
    held = {id(tensor): tensor for _, named in before for tensor in named.values() if tensor is not None}
    values = {key: tensor.detach().clone() for key, tensor in held.items() if key not in changing}
    try:
        yield
    finally:
        for tensors, named in before:  # a forward may put another tensor in the place of one, or of None
            for name in [name for name in tensors if name not in named]:
                del tensors[name]
            tensors |= named
        write_back((held[key] for key in values), values.values())


@torch.no_grad()
def write_back(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write to the tensors that do not have these values; some, such as expanded ones, cannot be written to.

    >>> ones = torch.ones(1).expand(3)
    >>> write_back([ones], [torch.ones(3)])
    """
    for tensor, value in zip(tensors, values):
        if not equal(tensor, value.to(tensor.device)):
            tensor.copy_(value)


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors, of any dtype, have the same shape, dtype and values.

    >>> equal(torch.ones(2), torch.ones(2)), equal(torch.ones(2), torch.ones(2).double())
    (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    try:
        return torch.equal(a, b)
    except NotImplementedError:  # float8 and half complex numbers, which torch can convert only
        return torch.equal(*(t.to(torch.complex64 if t.is_complex() else torch.float32) for t in (a, b)))


def tensors_in_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state_dict, by name, without what ``get_extra_state`` of a module adds.

    >>> list(tensors_in_state(nn.Linear(1, 1)))
    ['weight', 'bias']
    """
    return {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}


def buffer_names(network: nn.Module) -> set[str]:
    """Return all names of the persistent buffers.

    >>> sorted(buffer_names(nn.BatchNorm1d(2)))
    ['num_batches_tracked', 'running_mean', 'running_var']
    """
    return {name for name, _, buffer in tensors_of(network) if buffer}


def distinct_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers, each once, under the first of its names.

    >>> layer = nn.Linear(2, 2)
    >>> list(distinct_tensors(nn.Sequential(layer, layer)))
    ['0.weight', '0.bias']
    """
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, tensor, _ in tensors_of(network):
        distinct.setdefault(id(tensor), (name, tensor))
    return dict(distinct.values())


def wrapper_path(network: nn.Module) -> str:
    """Return the path of the network within ``nn.DataParallel``, ``torch.compile`` and the like; empty without these.

    >>> wrapper_path(nn.DataParallel(nn.Linear(1, 1)))
    'module'
    """
    path: list[str] = []
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            path.append("module")
        elif "_orig_mod" in network._modules:
            path.append("_orig_mod")
        else:
            return ".".join(path)
        network = network.get_submodule(path[-1])


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network within ``nn.DataParallel``, ``torch.compile`` and the like."""
    return network.get_submodule(wrapper_path(network))


def trainable_names(network: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that have ``requires_grad``, all names of those that modules share."""
    named = network.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if parameter.requires_grad)


def positional_arguments(module: nn.Module) -> dict[str, bool]:
    """Return the names of the positional arguments of the forward, and whether it must have each.

    Of a network in ``nn.DataParallel`` or the like, they are those of the network.

    >>> positional_arguments(nn.DataParallel(nn.Bilinear(2, 2, 2))), positional_arguments(nn.MaxUnpool1d(2))
    ({'input1': True, 'input2': True}, {'input': True, 'indices': True, 'output_size': False})
    """
    parameters = inspect.signature(unwrapped(module).forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {item.name: item.default is inspect.Parameter.empty for item in parameters if item.kind in kinds}


def subclass_of(original: type[nn.Module], prefix: str, body: dict[str, Any], *mixins: type) -> type[nn.Module]:
    """Return a subclass of a user's class.

    Raises:
        LoRunError: the class does not allow it.

    >>> subclass_of(nn.Linear, "Adapted", {"scale": 2}).__name__
    'AdaptedLinear'
    """
    try:
        return type(f"{prefix}{original.__name__}", (*mixins, original), body)
    except Exception as error:  # a metaclass, or __init_subclass__, may raise anything
        raise LoRunError(
            f"{original.__name__} allows no subclass ({type(error).__name__}: {error}), which adapters need: have its "
            "__init_subclass__ do without arguments"
        ) from error


def hint_on_arguments(network: nn.Module, arguments: Sequence[Any]) -> str:
    """The end of a sentence that says why a forward of ``network`` fails on ``arguments``; empty if it is not known.

    The data sets of deepinv (0.5) yield the truth first and no physics, which its networks take second.
    """
    signature = inspect.signature(unwrapped(network).forward).parameters.values()
    named = [p.name for p in signature if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if named:
        return f"; its forward takes {', '.join(named)} by keyword only: wrap it in a module that takes all by position"
    if list(positional_arguments(network))[1:2] != ["physics"] or not all(isinstance(a, Tensor) for a in arguments[:2]):
        return ""
    return "; for deepinv's batches, (x, y), pass (x, y, physics) in calibration=, or (y, physics) in example_inputs="


def owner_of(denoiser: nn.Module, name: str) -> tuple[int, str]:
    """Return the id of the module that holds the tensor ``name``, and the attribute that it holds it in.

    Two names of one tensor of one module give the same result.
    """
    path, _, attribute = name.rpartition(".")
    return id(denoiser.get_submodule(path)), attribute


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer ``name``, a path relative to ``module``.

    >>> tensor_of(nn.Sequential(nn.Linear(3, 2)), "0.weight").shape
    torch.Size([2, 3])
    """
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Return (name, tensor, whether it is a buffer) for all parameters and persistent buffers, under all their names.

    >>> [(name, buffer) for name, _, buffer in tensors_of(nn.BatchNorm1d(2, track_running_stats=False))]
    [('weight', False), ('bias', False)]
    """
    named: list[tuple[str, Tensor, bool]] = []
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        named += [(prefix + name, p, False) for name, p in child._parameters.items() if p is not None]
        named += [
            (prefix + name, b, True)
            for name, b in child._buffers.items()
            if b is not None and name not in child._non_persistent_buffers_set
        ]
    return named


def has_valid_values(tensor: Tensor, buffer: bool) -> bool:
    """Whether a trained network can hold ``tensor``: no NaN, and Inf only in a buffer, where masks have it.

    >>> mask = torch.tensor([0.0, float("inf")])
    >>> has_valid_values(mask, buffer=True), has_valid_values(mask, buffer=False)
    (True, False)
    """
    if not is_numeric(tensor):
        return True
    return not bool(torch.isnan(tensor).any()) if buffer else bool(torch.isfinite(tensor).all())


def closure_values(function: object) -> list[object]:
    """Return the values of the variables that ``function`` closes over; none where it is no closure.

    >>> def adder(step):
    ...     return lambda x: x + step
    >>> closure_values(adder(3)), closure_values(len)
    ([3], [])
    """
    values = []
    cells = function.__closure__ if isinstance(function, FunctionType) else None
    for cell in cells or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    return values
