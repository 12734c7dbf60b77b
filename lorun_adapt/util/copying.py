"""Copies of networks, with the functions that remember them.

``copy.deepcopy`` returns functions as they are. A network that keeps ``self.A = lambda x: F.conv2d(x, self.kernel)``
would have a copy whose function still reads the original's kernel. Here such functions are made anew: their closures
and defaults refer to the copy.
"""

from __future__ import annotations

import copy
import dis
import functools
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from .modules import closure_values
from .plain_copy import EMPTIED, Left, copy_plain, copy_rest

Value = TypeVar("Value")

ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)
LOCK, RLOCK = type(threading.Lock()), type(threading.RLock())
CONTAINERS = {dict, list, tuple, set, OrderedDict}  # without code of their own; modules have many empty ones
REGISTERED = ("_parameters", "_buffers", "_modules")


def copy_network(
    network: nn.Module,
    *,
    share_tensors: bool = False,
    replaced: Mapping[int, Tensor] | None = None,
    memo: dict[int, Any] | None = None,
) -> nn.Module:
    """Return a deep copy of ``network``, or with ``share_tensors`` a copy of its modules around the same tensors.

    Functions that remember the network remember the copy afterwards. Tensors that are part of a graph, which
    ``copy.deepcopy`` refuses, are copied without their graph.

    Args:
        network: the network to copy.
        share_tensors: keep the parameters and buffers instead of copying them.
        replaced: tensors that take the place of others, wherever the network holds these, by their ids.
        memo: deepcopy's: from the ids of originals to their copies.

    Raises:
        LoRunError: something in the network cannot be copied.

    >>> layer = nn.Linear(2, 2)
    >>> copy_network(layer).weight is layer.weight
    False
    >>> copy_network(layer, share_tensors=True).weight is layer.weight
    True
    """
    memo = {} if memo is None else memo
    if share_tensors:
        for module in network.modules():
            memo.update((id(t), t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    memo.update(replaced or {})
    return deep_copy(network, memo)


def deep_copy(value: Value, memo: dict[int, Any]) -> Value:
    """Return ``copy.deepcopy(value, memo)``, with new functions in the place of those that remember tensors or modules.

    Raises:
        LoRunError: a part of the value cannot be copied.

    >>> layer = nn.Linear(1, 1)
    >>> layer.twice = lambda layer=layer: 2 * layer.bias
    >>> copied = deep_copy(layer, {})
    >>> _ = nn.init.ones_(layer.bias), nn.init.zeros_(copied.bias)
    >>> copied.twice().item()
    0.0
    """
    left = copy_plain(value, memo) if isinstance(value, nn.Module) else []
    if not left and id(value) in memo:
        return cast(Value, memo[id(value)])
    parts = _Parts([value, *(item.value for item in left)], known=memo)
    for tensor in parts.of(Tensor):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    memo.update({id(module): module for module in parts.of(ModuleType)})
    memo.update({id(lock): threading.Lock() for lock in parts.of(LOCK)})
    memo.update({id(lock): threading.RLock() for lock in parts.of(RLOCK)})
    memo.update({id(condition): threading.Condition() for condition in parts.of(threading.Condition)})
    others = [module for module in parts.of(nn.Module) if id(module) not in memo]
    for module in others:
        for held in vars(module).values():  # deepcopy is slow with the many dicts that hold no hooks
            if type(held) in EMPTIED and not held:
                memo.setdefault(id(held), type(held)())
    dicts = [held for held in parts.dicts_that_hide_deepcopy() if id(held) not in memo]
    memo.update({id(held): type(held).__new__(type(held)) for held in dicts})
    functions = [function for function in parts.that_remember() if id(function) not in memo]
    cells: dict[int, CellType] = {}
    for function in functions:
        memo[id(function)] = _with_empty_cells(function, cells)
    try:
        copy_rest(left, memo)
        result = copy.deepcopy(value, memo)
        for function in functions:
            _fill(function, memo[id(function)], memo, parts)
        for held in dicts:
            _fill_dict(held, memo[id(held)], memo)
        copied = [(module, memo[id(module)]) for module in others if id(module) in memo]
        left += [Left(vars(new), name, held) for module, new in copied for name, held in vars(module).items()]
        for attributes, name, held in left:  # deepcopy keeps the function of a bound method, and weak references
            if isinstance(held, MethodType) and id(held.__func__) in memo:
                attributes[name] = MethodType(memo[id(held.__func__)], copy.deepcopy(held.__self__, memo))
            elif isinstance(held, weakref.ref) and id(held()) in memo:
                attributes[name] = weakref.ref(memo[id(held())])
    except Exception as error:  # copying runs the code of whatever the network holds
        failed = _Parts(value).first_that_fails(memo)
        raise LoRunError(
            f"cannot copy {failed} of {type(value).__name__} ({type(error).__name__}: {error}): make it anew in "
            "forward, or define __deepcopy__ in its class"
        ) from error
    return result


def check_separate(original: nn.Module, copied: nn.Module) -> None:
    """Check that ``copied`` holds no parameter or buffer of ``original``.

    Raises:
        LoRunError: it does, in something that cannot be copied, such as a function with a cache, or through a global
            variable.
    """
    owned = {id(tensor) for tensor in (*original.parameters(), *original.buffers())}
    parts = _Parts(copied, follow_globals=True)
    for tensor in parts.of(Tensor):
        if id(tensor) in owned:
            raise LoRunError(
                f"{parts.path_of(tensor)} of {type(original).__name__} reads the original network, and a copy of it "
                "would do so too: make it a method that reads self"
            )


def tensors_beside_modules(value: object) -> list[Tensor]:
    """The tensors that a value holds, but for those of modules: in lists, functions and other objects.

    >>> layer = nn.Linear(1, 1)
    >>> len(tensors_beside_modules(lambda: layer.bias)), len(tensors_beside_modules([lambda x=layer.bias: x]))
    (0, 1)
    """
    return _Parts(value, into_modules=False).of(Tensor)


class _Parts:
    """All that a value holds, functions and what they remember included.

    Args:
        root: the value.
        into_modules: look into modules.
        follow_globals: look into the global variables that functions read.
        known: ids of modules not to look into.
    """

    def __init__(
        self,
        root: object,
        *,
        into_modules: bool = True,
        follow_globals: bool = False,
        known: Collection[int] = (),
    ) -> None:
        self._values: dict[int, object] = {id(root): root}
        self._found: dict[int, tuple[int, str]] = {}  # for each value, the one that holds it, and by what name
        self._holders: dict[int, list[int]] = {}
        pending = deque([root])
        while pending:
            value = pending.popleft()
            if isinstance(value, nn.Module) and (not into_modules or id(value) in known):
                continue
            for name, child in _children(value, follow_globals):
                if isinstance(child, ATOMS) or (type(child) in CONTAINERS and not child):
                    continue
                self._holders.setdefault(id(child), []).append(id(value))
                if id(child) not in self._values:
                    self._values[id(child)] = child
                    self._found[id(child)] = id(value), name
                    pending.append(child)
        self._remember: set[int] | None = None

    def of(self, kind: type[Value]) -> list[Value]:
        return [value for value in self._values.values() if isinstance(value, kind)]

    def dicts_that_hide_deepcopy(self) -> list[dict[Any, Any]]:
        """The dicts whose keys are attributes: asked for ``__deepcopy__``, they look for such a key."""
        return [value for value in self._values.values() if isinstance(value, dict) and _hides_deepcopy(value)]

    def that_remember(self) -> list[FunctionType]:
        """The functions from which a tensor or a module can be reached."""
        return [function for function in self.of(FunctionType) if self.remembers(function)]

    def remembers(self, value: object) -> bool:
        """Whether a tensor or a module can be reached from ``value``."""
        if self._remember is None:
            pending = [id(found) for kind in (Tensor, nn.Module) for found in self.of(kind)]
            self._remember = set(pending)
            while pending:
                holders = [holder for holder in self._holders.get(pending.pop(), ()) if holder not in self._remember]
                self._remember.update(holders)
                pending += holders
        return id(value) in self._remember

    def path_of(self, value: object) -> str:
        """How to reach ``value``, up to the first function on the way."""
        names: list[str] = []
        key = id(value)
        while key in self._found:
            key, name = self._found[key]
            names = [] if isinstance(self._values[key], FunctionType) else [name, *names]
        return "".join(names).lstrip(".") or "a part"

    def first_that_fails(self, memo: Mapping[int, Any]) -> str:
        """The innermost part that cannot be copied by itself."""
        failing = {id(value) for value in self._values.values() if _fails(value, memo)}
        for key in failing:
            if not any(id(child) in failing for _, child in _children(self._values[key], False)):
                return self.path_of(self._values[key])
        return "a part"


def _fails(value: object, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, {key: item for key, item in memo.items() if key != id(value)})
    except Exception:
        return True
    return False


def _hides_deepcopy(value: dict[Any, Any]) -> bool:
    names = set().union(*(vars(kind) for kind in type(value).__mro__))
    return "__getattr__" in names and "__deepcopy__" not in names


def _fill_dict(held: dict[Any, Any], copied: dict[Any, Any], memo: dict[int, Any]) -> None:
    """Give ``copied``, empty, the items and attributes of ``held``, without running code of their class."""
    put = OrderedDict.__setitem__ if isinstance(held, OrderedDict) else dict.__setitem__
    for key, item in list(OrderedDict.items(held) if isinstance(held, OrderedDict) else dict.items(held)):
        put(copied, copy.deepcopy(key, memo), copy.deepcopy(item, memo))
    if isinstance(held, defaultdict):
        factory: Any = vars(defaultdict)["default_factory"]
        factory.__set__(copied, copy.deepcopy(factory.__get__(held), memo))
    for name, value in _attributes(held).items():
        object.__setattr__(copied, name, copy.deepcopy(value, memo))


def _children(value: object, follow_globals: bool) -> Iterator[tuple[str, object]]:
    """What a value holds, with the name for it in a path."""
    if isinstance(value, (Tensor, ModuleType)):
        return
    if isinstance(value, FunctionType):
        held = (*closure_values(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from ((f".{value.__name__}", item) for item in (*held, *vars(value).values()))
        if follow_globals:
            found = (value.__globals__.get(name) for name in _global_names(value.__code__))
            yield from ((f".{value.__name__}", item) for item in found if isinstance(item, (Tensor, nn.Module)))
        return
    if isinstance(value, MethodType):
        yield from (("", value.__self__), ("", value.__func__))
        return
    if isinstance(value, functools.partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in dict.items(value))
        yield from (("", key) for key in dict.keys(value))
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value) if not isinstance(item, ATOMS))
    elif isinstance(value, (set, frozenset)):
        yield from (("", item) for item in value)
    for name, item in _attributes(value).items():
        if isinstance(value, nn.Module) and name in REGISTERED:
            yield from ((f".{key}", inner) for key, inner in item.items())
        else:
            yield f".{name}", item


def _attributes(value: object) -> dict[str, Any]:
    """The attributes of an object, without running its code."""
    found: dict[str, Any] = {}
    for name in _slots(cast(Hashable, type(value))):
        try:
            found[name] = object.__getattribute__(value, name)
        except AttributeError:
            continue
    try:
        return found | object.__getattribute__(value, "__dict__")
    except AttributeError:
        return found


@functools.cache
def _slots(kind: type) -> list[str]:
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]


def _global_names(code: CodeType) -> set[str]:
    """The global variables that a function reads, and those within it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _with_empty_cells(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    """A copy of ``function`` with cells without values; functions that share a variable share its cell again."""
    for cell in function.__closure__ or ():
        cells.setdefault(id(cell), CellType())
    own = tuple(cells[id(cell)] for cell in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, own or None)
    for name in ("__qualname__", "__doc__", "__module__", "__annotations__"):
        setattr(copied, name, getattr(function, name))
    return copied


def _fill(function: FunctionType, copied: FunctionType, memo: dict[int, Any], parts: _Parts) -> None:
    """Give ``copied`` what ``function`` remembers: copies of what holds tensors or modules, and all else as it is."""

    def own(value: Value) -> Value:
        return copy.deepcopy(value, memo) if parts.remembers(value) else value

    for cell, new in zip(function.__closure__ or (), copied.__closure__ or ()):
        with suppress(ValueError):  # a variable that has no value yet
            content = cell.cell_contents
            new.cell_contents = own(content)
    copied.__defaults__ = None if function.__defaults__ is None else tuple(map(own, function.__defaults__))
    if function.__kwdefaults__ is not None:
        copied.__kwdefaults__ = {name: own(value) for name, value in function.__kwdefaults__.items()}
    vars(copied).update({name: own(value) for name, value in vars(function).items()})
