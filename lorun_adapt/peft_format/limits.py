"""Which stages PEFT can represent, and how; for the others, the reason why not."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..network.adapter import StageAdapter, private_tensors, terms_of
from ..stages.stage_map import Group
from .code import class_that_reads
from .lora import WITHIN_PEFT, unsupported_reason


@dataclass(frozen=True)
class PeftView:
    """How PEFT represents a stage; names are relative to the denoiser.

    Attributes:
        targets: the layers with low-rank factors.
        full: the targets that are private layers of the stage, stored as factors of full rank.
        whole: the adapted layers stored as full weights, because ``modules_to_save`` also matches their names.
        saved: ``modules_to_save``.
        problem: the reason why PEFT cannot represent the stage; None if it can.
    """

    targets: frozenset[str]
    full: frozenset[str]
    whole: frozenset[str]
    saved: tuple[str, ...]
    problem: str | None = None


def peft_view(
    denoiser: nn.Module, first: nn.Module, group: Group, adapter: StageAdapter, refused: str | None = None
) -> PeftView:
    """Return how PEFT can represent the stage of ``denoiser`` on the base denoiser ``first``, or why it cannot.

    PEFT's ``modules_to_save`` matches the ends of names: ``0`` also matches ``10``. If it would match an adapted layer
    as well, the private layer is stored as factors of full rank; if it is a norm, which has no factors, the adapted
    layer is stored as full weights instead. With ``refused``, a reason of the caller's, it cannot represent any.
    """
    terms, private = terms_of(adapter), private_tensors(adapter)
    supported = [name for name, term in terms.items() if term.as_lora() and unsupported_reason(denoiser, name) is None]
    layers = {name.rpartition(".")[0] for name in supported}
    owners = {name.rpartition(".")[0] for name in private} - layers
    problem = refused or _problem(denoiser, group, adapter, layers, owners)
    if problem is not None:
        return PeftView(frozenset(layers), frozenset(), frozenset(), (), problem)
    names = {name for name, _ in denoiser.named_modules(remove_duplicate=False) if name}
    within = {f"{layer}.{name}" for layer in layers for name in WITHIN_PEFT}
    full: set[str] = set()
    whole: set[str] = set()
    for owner in owners:
        if any(name.endswith(owner) for name in (layers | within) - {owner}):
            if unsupported_reason(denoiser, f"{owner}.weight") is None and not denoiser.get_submodule(owner)._buffers:
                full.add(owner)
    saved = tuple(sorted(owners - full))
    for owner in saved:
        met = {name for name in names if name.endswith(owner)} - {owner}
        whole |= met & (layers | full)
        inside = [name for name in within if name.endswith(owner)]
        others = [n for n in met - owners - layers if any(True for _ in denoiser.get_submodule(n).state_dict())]
        if others or inside:
            problem = f"PEFT's modules_to_save would match {min(others or inside)} as well as {owner}, by its ending"
    targets = (layers | full) - whole
    for owner in saved:  # the rule of peft.tuners.tuners_utils.check_target_module_exists (PEFT 0.21)
        try:
            excluded = [name for name in targets if re.match(rf"(^|.*\.){owner}($|\..*)", name)]
        except re.error:
            excluded = [owner]
        if excluded:
            problem = f"PEFT's modules_to_save treats the name {owner} as a pattern, which also matches other layers"
    if not targets:
        problem = "PEFT's modules_to_save would match every adapted layer"
    problem = problem or layer_problem(denoiser, first, targets)
    if problem is not None:
        return PeftView(frozenset(layers), frozenset(), frozenset(), (), problem)
    return PeftView(frozenset(targets), frozenset(full - whole), frozenset(whole), saved)


def layer_problem(denoiser: nn.Module, first: nn.Module, layers: Collection[str]) -> str | None:
    """Return the reason why PEFT's factors on ``layers`` of ``first`` would compute something else than the stage.

    None if they compute the same as terms on the weights of ``denoiser``.
    """
    reader = class_that_reads(denoiser, layers)
    if reader is not None:
        return f"the code of {reader} does more with its layers than call them, which PEFT's layers do not support"
    if (name := _difference(denoiser, first)) is not None:
        return f"the stages differ in {name}, which an adapter cannot store"
    return None


def _problem(
    denoiser: nn.Module, group: Group, adapter: StageAdapter, layers: Collection[str], owners: Collection[str]
) -> str | None:
    """Return the reason why PEFT cannot represent the stage, regardless of ``modules_to_save``; None if it can."""
    terms, private = terms_of(adapter), private_tensors(adapter)
    for name, term in terms.items():
        if term.as_lora() is None:
            return f"the tensor {name} is adapted by a {type(term).__name__}, which PEFT cannot represent"
        if (reason := unsupported_reason(denoiser, name)) is not None:
            return f"the tensor {name} is adapted, but {reason}"
    if not terms:
        return "the stage has no adapted tensor, so PEFT has nothing to target"
    if any(len(spec.aliases) > 1 for spec in group.tensors):
        return "the stage ties tensors, which PEFT does not support"
    for owner in sorted(owners):
        module = denoiser.get_submodule(owner)
        own = next(name for name in private if name.rpartition(".")[0] == owner)
        lists = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        if not owner or lists or any(True for _ in module.children()):
            return f"the private tensor {own} is not in a layer, and PEFT's modules_to_save stores only whole layers"
        shared = [name for name in module.state_dict() if f"{owner}.{name}" not in private]
        if shared:
            return f"the private tensor {own} is in the same layer as {shared[0]}, which all stages share"
    for name in (*layers, *owners):
        if any(part in name for part in ("lora_", "weight")):  # PEFT 0.17 searches for these anywhere in a name
            return f"PEFT mistakes the name {name} for one of its own"
    return None


def _difference(denoiser: nn.Module, first: nn.Module) -> str | None:
    """Return the name of an attribute or constant tensor in which two modules of one class differ; None if equal."""
    if denoiser is first:
        return None
    others = dict(first.named_modules(remove_duplicate=False))
    for path, module in denoiser.named_modules(remove_duplicate=False):
        mine, other = vars(module), vars(others[path])
        for name in mine.keys() - {"training"}:
            a, b = mine[name], other.get(name)
            if isinstance(a, (int, float, str, tuple, list, type(None))) and _is_simple(a) and _is_simple(b) and a != b:
                return f"{path}.{name}".lstrip(".")
        for name in module._non_persistent_buffers_set:
            a, b = module._buffers.get(name), others[path]._buffers.get(name)
            if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or not torch.equal(a, b))):
                return f"{path}.{name}".lstrip(".")
    return None


def _is_simple(value: object) -> bool:
    """Whether a value consists of numbers and strings, so that comparing it with ``!=`` gives a bool."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return isinstance(value, (int, float, str, type(None)))
