"""Copy what is plain in a network: its modules, tensors, constants, and the containers of these.

``copy.deepcopy`` takes several times as long, since it treats each of the many attributes of a module as an object
that may have code of its own. Few do; these are left to it.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

CONSTANTS = {str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size}
EMPTIED = {dict, OrderedDict, set, list}
# A class with one of these is left to deepcopy.
OWN_CODE = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__", "__getattr__", "__delattr__")


class Left(NamedTuple):
    """An attribute that is not plain: it must be copied to ``attributes[name]``."""

    attributes: dict[str, Any]
    name: str
    value: object


def copy_plain(network: nn.Module, memo: dict[int, Any]) -> list[Left]:
    """Copy the modules of a network, but for the attributes that are not plain.

    Not plain are modules in lists, functions that remember something, objects, and modules whose class has its own code
    for copying. Tensors that are part of a graph are copied without their graph.

    Args:
        network: the network.
        memo: deepcopy's: from the ids of originals to their copies. The copied modules are added.

    Returns:
        What is left to copy. The copies are complete if there is nothing and the network is in ``memo``.

    >>> layer, memo = nn.Linear(2, 2), {}
    >>> layer.twice = lambda layer=layer: 2 * layer.bias
    >>> [left.name for left in copy_plain(layer, memo)]
    ['twice']
    >>> memo[id(layer)].weight is layer.weight, torch.equal(memo[id(layer)].weight, layer.weight)
    (False, True)
    """
    modules = [m for m in network.modules() if id(m) not in memo and _copies_plainly(cast(Hashable, type(m)))]
    for module in modules:
        memo[id(module)] = module.__new__(type(module))
    found: list[Left] = []
    for module in modules:
        attributes = vars(memo[id(module)])
        for name, value in vars(module).items():
            kind = type(value)
            if kind in CONSTANTS:
                attributes[name] = value
            elif kind in EMPTIED and not value and id(value) not in memo:
                attributes[name] = memo[id(value)] = kind()
            else:
                made: dict[int, Any] = {}
                try:
                    attributes[name] = _copied(value, memo, made)
                except Exception:  # not plain, or deepcopy fails for a tensor, as it will again where it is reported
                    attributes[name] = None  # so that the attributes keep their order
                    found.append(Left(attributes, name, value))
                else:
                    memo.update(made)
    return found


def copy_rest(found: Iterable[Left], memo: dict[int, Any]) -> None:
    """Copy with ``copy.deepcopy`` what :func:`copy_plain` left."""
    for attributes, name, value in found:
        attributes[name] = copy.deepcopy(value, memo)


@functools.cache
def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether a class leaves its copies to ``nn.Module``; layers of torch restore only pickles of old versions."""
    restores = next(base for base in kind.__mro__ if "__setstate__" in vars(base))
    slots = any("__slots__" in vars(base) for base in kind.__mro__)
    own = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in OWN_CODE)
    return not own and not slots and restores.__module__.startswith("torch.nn.")


def _copied(value: Any, memo: dict[int, Any], made: dict[int, Any]) -> Any:
    """Return a copy of a plain value. ``made`` receives what belongs into the memo if nothing within fails."""
    kind, key = type(value), id(value)
    result: Any
    if kind in CONSTANTS:
        return value
    if key in memo or key in made:
        return memo[key] if key in memo else made[key]
    if kind is dict or (kind is OrderedDict and not vars(value)):
        _check_constant(value)
        made[key] = result = kind()
        for name, item in value.items():
            known = memo.get(id(item))  # most parameters and modules are
            result[name] = _copied(item, memo, made) if known is None else known
    elif kind is list:
        made[key] = result = []
        result += [_copied(item, memo, made) for item in value]
    elif kind is set:
        _check_constant(value)
        made[key] = result = value.copy()
    elif kind is tuple:
        result = value
        if not CONSTANTS.issuperset(map(type, value)):
            items = tuple([_copied(item, memo, made) for item in value])
            result = value if all(new is old for new, old in zip(items, value)) else items
        made[key] = result
    elif isinstance(value, Tensor):
        made[key] = result = copy.deepcopy(value, memo) if value.is_leaf else value.detach().clone()
    elif kind is BuiltinFunctionType or (kind is FunctionType and not _remembers(value)):
        result = value
    else:
        raise TypeError(f"a {kind.__name__} is not plain")
    return result


def _check_constant(values: Collection[Any]) -> None:
    if not CONSTANTS.issuperset(map(type, values)):
        raise TypeError("keys that are not constant are not plain")


def _remembers(function: FunctionType) -> bool:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return bool(function.__closure__ or vars(function)) or any(type(value) not in CONSTANTS for value in defaults)
