"""Count the calls of a looped module: call k of a forward runs with the adapter of stage k.

The counts belong to a forward, not to the module: each thread has a stack of open forwards, so exceptions,
nested forwards and threads can't mix them up. What ``torch.utils.checkpoint`` recomputes runs during
backward, when no forward is open. So each tensor that autograd saves carries the counts at the time, and
unpacking it, with which every recomputation starts, restores them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..util.modules import subclass_of


class _Forward:
    """How often each looped module has been called in one forward."""

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self.counts = dict(counts or {})
        # For recomputation: the counts when autograd last saved a tensor, and those before the calls that
        # ran without gradients since then, as inside a reentrant checkpoint.
        self.saved = dict(self.counts)
        self.start = dict(self.counts)
        self.with_grad = False

    def call(self, name: str) -> int:
        index = self.counts.get(name, 0)
        self.counts[name] = index + 1
        self.with_grad = self.with_grad or torch.is_grad_enabled()
        return index

    def counts_to_save(self) -> dict[str, int]:
        if self.counts != self.saved:
            # A reentrant checkpoint saves its inputs after it ran, any other before.
            self.start = self.counts if self.with_grad else self.saved
            self.start, self.saved, self.with_grad = dict(self.start), dict(self.counts), False
        return self.start


class _Threads(threading.local):
    def __init__(self) -> None:
        self.open: list[_Forward] = []
        self.recomputed: _Forward | None = None


_threads = _Threads()


def count_while_compiling(network: nn.Module) -> None:
    """Start counting for a forward that ``torch.compile`` traces, where calls are counted at tracing time."""
    for module in network.modules():
        if isinstance(module, Called):
            module.lorun_compiled_call = 0


@contextmanager
def counting(recomputes: bool = True) -> Iterator[None]:
    """Run one forward in the block: looped modules count their calls from zero.

    Without ``recomputes``, a backward pass cannot run parts of the forward again.

    >>> looped = nn.Identity()
    >>> tell_calls_apart(looped, "looped", [nn.Softplus(), nn.Tanh()])
    >>> with counting():
    ...     looped(looped(torch.zeros(1)))  # tanh(softplus(0))
    tensor([0.6000])
    """
    forward = _Forward()
    _threads.open.append(forward)
    try:
        if recomputes and torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_pack(forward), _unpack):
                yield
        else:
            yield
    finally:
        _threads.open.remove(forward)


_Packed = tuple[Tensor, int, dict[str, int]]


def _pack(forward: _Forward) -> Callable[[Tensor], _Packed]:
    def pack(tensor: Tensor) -> _Packed:
        # Detached, as an output that its own graph holds would keep both in memory.
        return tensor.detach(), tensor._version, forward.counts_to_save()

    return pack


def _unpack(packed: _Packed) -> Tensor:
    tensor, version, counts = packed
    if tensor._version != version:
        raise RuntimeError("a tensor needed for the gradient was changed in place after the forward used it")
    _threads.recomputed = _Forward(counts)
    return tensor


class Called:
    """A mixin for the class of a looped module: the forward runs the copy of the module for the current call."""

    lorun_name: str
    lorun_calls: nn.ModuleList
    lorun_compiled_call: int
    lorun_repeats_last: bool

    def forward(self, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            index = self.lorun_compiled_call
            self.lorun_compiled_call = index + 1
        else:
            forward = _threads.open[-1] if _threads.open else _threads.recomputed
            if forward is None:
                raise LoRunError(
                    f"{self.lorun_name!r} is called outside a forward of its network, where its stage is unknown: "
                    "call the LoRunModel"
                )
            index = forward.call(self.lorun_name)
        if index >= len(self.lorun_calls) and self.lorun_repeats_last:
            index = len(self.lorun_calls) - 1
        if index >= len(self.lorun_calls):
            raise LoRunError(
                f"expected {len(self.lorun_calls)} calls of {self.lorun_name!r} in a forward, found one more: convert "
                'with calls=, or with example_inputs= for which it is called as often, or set lorun.beyond = "last"'
            )
        return self.lorun_calls[index](*args, **kwargs)


def tell_calls_apart(module: nn.Module, name: str, copies: list[nn.Module], repeats_last: bool = False) -> None:
    """Make call k of ``module`` in a forward run ``copies[k]``; it stays the same object, of a subclass.

    With ``repeats_last``, calls beyond these run the last one; otherwise they are an error.
    """
    for copy in copies:
        for hooks in (copy._forward_hooks, copy._forward_pre_hooks, copy._backward_hooks, copy._backward_pre_hooks):
            hooks.clear()  # they run on `module` already
    module.__class__ = _called_class(cast(Hashable, type(module)))
    assert isinstance(module, Called)
    module.lorun_calls = nn.ModuleList(copies)
    module.lorun_name = name
    module.lorun_repeats_last = repeats_last
    module.lorun_compiled_call = 0


@functools.cache
def _called_class(original: type[nn.Module]) -> type[nn.Module]:
    body = {"__module__": original.__module__, "lorun_original_class": original}
    return subclass_of(original, "Called", body, Called)


class CountsCalls(nn.Module):
    """A mixin for the class of a network with looped modules: each of its forwards counts their calls from zero."""

    lorun_recomputes = True  # until a forward shows that it cannot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In __call__ rather than forward: a network may have a forward of its own among its attributes.
        if torch.compiler.is_compiling():
            count_while_compiling(self)
            return super().__call__(*args, **kwargs)
        try:
            with counting(self.lorun_recomputes):
                return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            if not self.lorun_recomputes or "saved tensor hooks" not in str(error):  # which torch.func does not allow
                raise
        self.lorun_recomputes = False
        with counting(self.lorun_recomputes):
            return super().__call__(*args, **kwargs)


def count_calls(network: nn.Module) -> None:
    """Make each forward of ``network`` count the calls of looped modules; it stays the same object, of a subclass."""
    network.__class__ = _counting_class(cast(Hashable, type(network)))


@functools.cache
def _counting_class(original: type[nn.Module]) -> type[nn.Module]:
    named = getattr(original, "lorun_original_class", original)
    body = {"__module__": original.__module__, "lorun_original_class": named}
    return subclass_of(original, "Counting", body, CountsCalls)
