"""Tell the calls of one module apart: call k of a forward runs with the adapter of stage k.

The count belongs to a forward, not to the module: each thread has a stack of open forwards, so
exceptions, nested forwards and threads can't mix theirs up. What ``torch.utils.checkpoint``
recomputes runs during backward, when no forward is open: each tensor that autograd keeps then
carries the count at which it was kept, and unpacking it, which is how every recomputation starts,
puts that count back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError


class _Forward:
    """How often each looped module was called so far in one forward."""

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self.counts = dict(counts or {})
        # For recomputation: the counts when autograd last kept a tensor, and where the calls since
        # then began if all of them ran without gradients, as inside a reentrant checkpoint.
        self.kept = dict(self.counts)
        self.start = dict(self.counts)
        self.with_grad = False

    def call(self, name: str) -> int:
        index = self.counts.get(name, 0)
        self.counts[name] = index + 1
        self.with_grad = self.with_grad or torch.is_grad_enabled()
        return index

    def counts_to_keep(self) -> dict[str, int]:
        if self.counts != self.kept:
            # A reentrant checkpoint keeps its inputs only after it ran; a plain one before.
            self.start = self.counts if self.with_grad else self.kept
            self.start, self.kept, self.with_grad = dict(self.start), dict(self.counts), False
        return self.start


class _Threads(threading.local):
    def __init__(self) -> None:
        self.open: list[_Forward] = []
        self.recomputed: _Forward | None = None


_threads = _Threads()


def count_while_compiling(network: nn.Module) -> None:
    """Start a forward that ``torch.compile`` traces: there the calls are counted once and for all."""
    for module in network.modules():
        if isinstance(module, Called):
            module.lorun_compiled_call = 0


@contextmanager
def counting() -> Iterator[None]:
    """One forward, within which looped modules count their calls from zero."""
    forward = _Forward()
    _threads.open.append(forward)
    try:
        if torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_keep(forward), _unpack):
                yield
        else:
            yield
    finally:
        _threads.open.remove(forward)


def _keep(forward: _Forward):
    def pack(tensor: Tensor) -> tuple[Tensor, int, dict[str, int]]:
        # Detached: keeping an output itself would tie the graph to itself, and free neither.
        return tensor.detach(), tensor._version, forward.counts_to_keep()

    return pack


def _unpack(kept: tuple[Tensor, int, dict[str, int]]) -> Tensor:
    tensor, version, counts = kept
    if tensor._version != version:
        raise RuntimeError("a tensor needed for the gradient was changed in place after the forward used it")
    _threads.recomputed = _Forward(counts)
    return tensor


class Called:
    """Mixed into the class of a looped module: its forward runs the copy that belongs to the call."""

    lorun_name: str
    lorun_calls: nn.ModuleList
    lorun_compiled_call: int

    def forward(self, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            index = self.lorun_compiled_call
            self.lorun_compiled_call = index + 1
        else:
            forward = _threads.open[-1] if _threads.open else _threads.recomputed
            if forward is None:
                raise LoRunError(
                    f"expected {self.lorun_name!r} to be called by its network's forward, found a call from outside: "
                    "call the LoRunModel, which knows the stage"
                )
            index = forward.call(self.lorun_name)
        if index >= len(self.lorun_calls):
            raise LoRunError(
                f"expected {len(self.lorun_calls)} calls of {self.lorun_name!r} in a forward, found one more: convert "
                "with example_inputs= or calls= that show them all"
            )
        return self.lorun_calls[index](*args, **kwargs)


def tell_calls_apart(module: nn.Module, name: str, copies: list[nn.Module]) -> None:
    """Make ``module`` run ``copies[k]`` at its k-th call; it stays the same object, of a subclass."""
    for twin in copies:
        for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks, twin._backward_pre_hooks):
            hooks.clear()  # they run on `module` already
    module.lorun_calls = nn.ModuleList(copies)
    module.lorun_name = name
    module.lorun_compiled_call = 0
    module.__class__ = _called_class(type(module))


@functools.cache
def _called_class(original: type[nn.Module]) -> type[nn.Module]:
    body = {"__module__": original.__module__, "lorun_original_class": original}
    return type(f"Called{original.__name__}", (Called, original), body)


class CountsCalls:
    """Mixed into the class of a network with looped modules: each of its forwards counts their calls from zero."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In __call__ rather than forward: a network may have a forward of its own among its attributes.
        if torch.compiler.is_compiling():
            count_while_compiling(self)  # type: ignore[arg-type]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with counting():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def count_calls(network: nn.Module) -> None:
    """Make each forward of ``network`` count the calls of its looped modules; it stays the same object, of a subclass."""
    network.__class__ = _counting_class(type(network))


@functools.cache
def _counting_class(original: type[nn.Module]) -> type[nn.Module]:
    body = {"__module__": original.__module__, "lorun_original_class": getattr(original, "lorun_original_class", original)}
    return type(f"Counting{original.__name__}", (CountsCalls, original), body)
