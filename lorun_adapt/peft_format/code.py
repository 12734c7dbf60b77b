"""Find denoisers whose code does more with their layers than call them, for which PEFT's LoRA is not right.

PEFT puts a module of its own in the place of a layer. Code that reads the layer's weight itself, such as
``F.conv2d(x, self.conv.weight)``, or checks its class, would silently run without the adapter. The code is
inspected, not run: everything that ``forward`` refers to by name.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Collection, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from torch import nn

from ..network.adapted import original_class

WEIGHTS = {"weight", "bias", "parameters", "named_parameters", "_parameters", "state_dict", "get_parameter"}
CLASSES = {"isinstance", "issubclass", "type", "__class__"}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NOT_FOLLOWED = {"torch", "numpy", "einops", *sys.stdlib_module_names}

Chain = tuple["str | None", ...]


def class_that_reads(denoiser: nn.Module, layers: Collection[str]) -> str | None:
    """The name of a module's class whose code does more with one of ``layers`` than call it; None if there is none."""
    for path, module in denoiser.named_modules():
        kind = original_class(module)
        if kind.__module__.startswith("torch."):
            children = {f"{path}.{name}".lstrip(".") for name, _ in module.named_children()}
            if children & set(layers) and kind not in CONTAINERS:  # such as nn.TransformerEncoderLayer
                return kind.__name__
        elif any(_reads(code, own, denoiser, path, layers) for code, own in _code_of(module)):
            return kind.__name__
    return None


def _reads(code: CodeType, own: str | None, denoiser: nn.Module, path: str, layers: Collection[str]) -> bool:
    """Whether ``code`` of the module at ``path``, which it calls ``own``, does more with ``layers`` than call them."""
    names = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
    if names & CLASSES and any(isinstance(getattr(nn, name, None), type) for name in names):
        return True
    if WEIGHTS & {text for text in code.co_consts if isinstance(text, str)}:
        return True
    for chain in _chains(code, own):
        if chain[0] is None:
            if chain[-1] in WEIGHTS:
                return True
            continue
        prefixes = [".".join(filter(None, [path, *chain[:end]])) for end in range(1, len(chain))]
        if any(prefix in layers for prefix in prefixes):
            return True
        if chain[-1] in WEIGHTS and prefixes and not _is_leaf(denoiser, prefixes[-1]):
            return True
    return False


def _is_leaf(denoiser: nn.Module, path: str) -> bool:
    try:
        module = denoiser.get_submodule(path)
    except AttributeError:
        return False
    return not any(True for _ in module.children())


@functools.lru_cache(maxsize=4096)
def _chains(code: CodeType, own: str | None) -> tuple[Chain, ...]:
    """The chains of attributes that code reads: ``self.conv.weight`` as ("conv", "weight").

    A chain that does not start at ``own``, the variable of the module itself, starts with None.
    """
    chains: list[Chain] = []
    chain: Chain = (None,)
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_FAST"):
            loaded = instruction.argval
            last = loaded[-1] if isinstance(loaded, tuple) else loaded
            chain = () if own is not None and last == own else (None,)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, str(instruction.argval))
            chains.append(chain)
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "NOP"):
            chain = (None,)
    return tuple(chains)


def _code_of(module: nn.Module) -> Iterator[tuple[CodeType, str | None]]:
    """The code that ``forward`` refers to by name, each with the variable that it has for the module itself."""
    kinds = [kind for kind in original_class(module).__mro__ if _is_followed(kind)]
    pending: list[tuple[object, bool]] = [(kind.__dict__["forward"], True) for kind in kinds if "forward" in vars(kind)]
    pending.append((vars(module).get("forward"), isinstance(vars(module).get("forward"), MethodType)))
    seen: set[CodeType] = set()
    while pending:
        value, is_method = pending.pop()
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, (staticmethod, classmethod)):
            value, is_method = value.__func__, False
        while isinstance(value, (functools.partial, functools.partialmethod, MethodType)):
            value = value.__func__ if isinstance(value, MethodType) else value.func
        if isinstance(value, type):
            pending += [
                (item, False) for item in vars(value).values() if isinstance(item, (FunctionType, staticmethod))
            ]
            continue
        code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
        if not isinstance(code, CodeType):
            if not isinstance(value, nn.Module) and callable(value) and _is_followed(type(value)):
                pending.append((type(value), False))
            continue
        if code in seen:
            continue
        seen.add(code)
        yield code, code.co_varnames[0] if is_method and code.co_argcount else None
        pending += [(constant, False) for constant in code.co_consts if isinstance(constant, CodeType)]
        pending.append((getattr(value, "__wrapped__", None), is_method))
        for cell in getattr(value, "__closure__", None) or ():
            if not inspect.isclass(content := _content(cell)) and _is_followed(content):
                pending.append((content, is_method))
        around = getattr(value, "__globals__", {})
        names = [*code.co_names, *(text for text in code.co_consts if isinstance(text, str))]
        for name in names:
            pending += [(vars(kind)[name], True) for kind in kinds if name in vars(kind)]
            if name in vars(module):
                pending.append((vars(module)[name], isinstance(vars(module)[name], MethodType)))
            if name in around and _is_followed(around[name]):
                pending.append((around[name], False))
                if isinstance(around[name], ModuleType):
                    inner = [getattr(around[name], other, None) for other in names]
                    pending += [(item, False) for item in inner if _is_followed(item)]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _is_followed(value: object) -> bool:
    """Whether a value is code of the network's authors, and not of a library."""
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] not in NOT_FOLLOWED
    if isinstance(value, (functools.partial, FunctionType, MethodType)) or inspect.isclass(value):
        return (getattr(value, "__module__", None) or "").split(".")[0] not in NOT_FOLLOWED
    return type(value).__module__.split(".")[0] not in NOT_FOLLOWED and callable(value)
