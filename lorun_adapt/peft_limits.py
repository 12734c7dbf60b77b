"""What PEFT can represent of a stage, and why it can't where it can't."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

from .assemble import StageAdapter, lowrank_terms, private_tensors
from .lowrank import plain_class
from .stages import Group

PREFIX = "base_model.model."  # of a denoiser's names within a PeftModel
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def peft_layer(denoiser: nn.Module, name: str) -> nn.Module | None:
    """The layer whose weight the tensor ``name`` is, if PEFT's LoRA does to it what we do."""
    module = denoiser.get_submodule(name.rpartition(".")[0])
    return module if _why_not(denoiser, name) is None else None


@dataclass(frozen=True)
class PeftView:
    """How PEFT is to see a stage; names are relative to the denoiser."""

    targets: frozenset[str]  # layers with low-rank factors
    full: frozenset[str]  # among them, the stage's own layers, as factors of full rank
    whole: frozenset[str]  # adapted layers that PEFT takes whole
    saved: tuple[str, ...]  # modules_to_save
    problem: str | None = None  # why PEFT can't represent the stage


def peft_view(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> PeftView:
    """How PEFT can represent the stage, or why it can't.

    PEFT's ``modules_to_save`` finds modules by how their names end: ``0`` is ``10`` as well. Where
    that would take an adapted layer, the stage's own layer travels as factors of full rank, or,
    if it is a norm, the adapted layer travels whole.
    """
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    layers = {name.rpartition(".")[0] for name in terms if _why_not(denoiser, name) is None}
    owners = {name.rpartition(".")[0] for name in private} - layers
    problem = _problem(denoiser, group, adapter, layers, owners)
    if problem is not None:
        return PeftView(frozenset(layers), frozenset(), frozenset(), (), problem)
    names = [name for name, _ in denoiser.named_modules(remove_duplicate=False) if name]
    full, whole = set(), set()
    for owner in owners:
        met = {name for name in names if name.endswith(owner)} - {owner}
        if (
            met & layers
            and _why_not(denoiser, f"{owner}.weight") is None
            and denoiser.get_submodule(owner)._buffers == {}
        ):
            full.add(owner)
    saved = tuple(sorted(owners - full))
    for owner in saved:
        met = {name for name in names if name.endswith(owner)} - {owner}
        whole |= met & (layers | full)
        others = met - owners - layers
        if any(True for name in others for _ in denoiser.get_submodule(name).state_dict()):
            problem = f"PEFT's modules_to_save can't name {owner} without {min(others)}, whose name ends alike"
    targets = (layers | full) - whole
    for owner in saved:  # as in peft.tuners.tuners_utils.check_target_module_exists (PEFT 0.21)
        if any(re.match(rf"(^|.*\.){owner}($|\..*)", name) for name in targets):
            problem = f"PEFT's modules_to_save can't name {owner} without an adapted layer, whose name is alike"
    if not targets:
        problem = "every adapted layer has a name that PEFT's modules_to_save takes for one of the stage's own"
    return PeftView(frozenset(targets), frozenset(full - whole), frozenset(whole), saved, problem)


def _problem(
    denoiser: nn.Module, group: Group, adapter: StageAdapter, layers: Collection[str], owners: Collection[str]
) -> str | None:
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    for name in terms:
        if (reason := _why_not(denoiser, name)) is not None:
            return f"the tensor {name} is adapted, and {reason}"
    if not terms:
        return "the stage has no low-rank term, so that there is nothing for PEFT to target"
    if any(len(spec.aliases) > 1 for spec in group.tensors):
        return "the stage ties tensors within itself"
    for owner in sorted(owners):
        module = denoiser.get_submodule(owner)
        own = next(name for name in private if name.rpartition(".")[0] == owner)
        if not owner or any(True for _ in module.children()):
            return f"the stage's own {own} is not in a layer, and PEFT's modules_to_save takes whole modules"
        lacking = [name for name in module.state_dict() if f"{owner}.{name}" not in private]
        if lacking:
            return f"the stage's own {own} is in one module with {lacking[0]}, which all stages have in common"
    reader = _reader_of_weights(denoiser, layers)
    if reader is not None:
        return f"the code of {reader} reads weights past the layers that hold them, where PEFT's would be the base's"
    return None


def _why_not(denoiser: nn.Module, name: str) -> str | None:
    path, _, attribute = name.rpartition(".")
    module = denoiser.get_submodule(path)
    kind = plain_class(module)
    if not path and attribute == "weight" and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return "the denoiser is that one layer, which PEFT can't replace"
    if attribute != "weight" or kind not in (nn.Linear, *CONVOLUTIONS):
        return f"PEFT's LoRA has no layer that is right for the {attribute} of {kind.__name__}"
    if not module._parameters["weight"].is_floating_point():
        return "PEFT's LoRA is for real numbers"
    if kind is nn.Linear:
        return None
    if module.groups != 1:
        return f"its convolution has {module.groups} groups, for which PEFT's factors have another shape"
    if module.padding_mode != "zeros":
        return f"PEFT's LoRA of a convolution loses padding_mode={module.padding_mode!r}"
    if any(step != 1 for step in module.dilation):
        return f"PEFT's LoRA of a convolution loses dilation={module.dilation}"
    return None


# --- code that reads a layer's weights itself, as F.conv2d(x, self.conv.weight) ------------------

_WEIGHTS = {"weight", "bias", "parameters", "named_parameters", "_parameters", "state_dict"}


def _reader_of_weights(denoiser: nn.Module, layers: Collection[str]) -> str | None:
    """A module whose forward reads the weight or bias of an adapted layer, as far as its code shows."""
    for path, module in denoiser.named_modules():
        kind = plain_class(module)
        if kind.__module__.startswith("torch."):
            continue
        for code, is_method in _code_of(kind):
            own = code.co_varnames[0] if is_method and code.co_argcount else None
            for attributes in _attributes_read(code, own):
                held = ".".join(filter(None, [path, *attributes[:-1]]))
                if own is not None and attributes[:1] != (None,):
                    if not attributes[:-1] or (held not in layers and _is_module(denoiser, held)):
                        continue  # its own parameter, or that of a module that PEFT saves whole
                return kind.__name__
    return None


def _is_module(denoiser: nn.Module, path: str) -> bool:
    try:
        module = denoiser.get_submodule(path)
    except AttributeError:
        return False
    return not any(True for _ in module.children())


def _code_of(kind: type[nn.Module]) -> Iterator[tuple[CodeType, bool]]:
    """The code that ``forward`` runs, as far as names lead: methods, functions beside them, inner functions."""
    pending: list[tuple[object, bool]] = [(kind.forward, True)]
    seen: set[CodeType] = set()
    while pending:
        function, is_method = pending.pop()
        function = inspect.unwrap(function) if callable(function) else function
        code = function if isinstance(function, CodeType) else getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        yield code, is_method
        pending += [(constant, False) for constant in code.co_consts if isinstance(constant, CodeType)]
        around = getattr(function, "__globals__", {})
        for name in code.co_names:
            method, helper = getattr(kind, name, None), around.get(name)
            if isinstance(method, FunctionType) and not method.__module__.startswith("torch."):
                pending.append((method, True))
            if isinstance(helper, FunctionType) and not helper.__module__.startswith("torch."):
                pending.append((helper, False))


def _attributes_read(code: CodeType, own: str | None) -> Iterator[tuple[str | None, ...]]:
    """Chains of attributes that end in a weight: ``self.conv.weight`` as ("conv", "weight").

    A chain that doesn't start at ``own`` starts with None.
    """
    chain: tuple[str | None, ...] = (None,)
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_FAST"):
            loaded = instruction.argval
            last = loaded[-1] if isinstance(loaded, tuple) else loaded
            chain = () if own is not None and last == own else (None,)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, str(instruction.argval))
            if chain[-1] in _WEIGHTS:
                yield chain
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "NOP"):
            chain = (None,)
