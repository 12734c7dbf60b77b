"""Recompute the stages in the backward pass instead of keeping their intermediate results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from ..errors import LoRunError
from ..factorise.sensitivity import IN_PLACE
from ..util.energy import relative_error
from ..util.nested import map_tensors, tensors_in
from .slow_in_bfloat16 import SlowInFloat32

SAME = 1e-3  # the relative difference at which two runs of a stage are no longer the same
CHANGED = (
    "the network changes a stage's input in place, so the stage cannot run again in the backward pass: train without "
    "recompute"
)
DIFFERENT = (
    "a stage does something else when it runs again in the backward pass, as it keeps a state, changes an object that "
    "it is given, or recomputes parts of its own: train without recompute"
)
WITHIN_FUNC = "a stage runs within torch.func.grad or vjp, where torch cannot recompute: train without recompute"


@contextmanager
def recomputing(denoisers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, ``denoisers`` keep only their arguments for the backward pass, which runs them again.

    The backward pass itself may come after the block. Gradients are the same, and a step takes about a third longer.

    >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with recomputing(list(layers)):
    ...     loss = layers(torch.ones(1, 2)).sum()
    >>> loss.backward()
    >>> layers[1].bias.grad
    tensor([1.])
    """
    modules = list(dict.fromkeys(denoisers))
    kept = [vars(module).get("forward") for module in modules]
    for module in modules:
        object.__setattr__(module, "forward", _recomputed(module.forward))
    try:
        yield
    finally:
        for module, own in zip(modules, kept):
            if own is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", own)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        given = _without_aliases((arguments, keywords))
        versions = _versions(given)
        returned: list[tuple[Tensor, int]] | None = None

        def once_more(*arguments: Any, **keywords: Any) -> Any:
            nonlocal returned
            if returned is None:
                result = forward(*arguments, **keywords)
                returned = [(tensor.detach(), tensor._version) for tensor in tensors_in(result)]
                return result
            if any(tensor._version != version for tensor, version in versions):
                raise LoRunError(CHANGED)
            arguments, keywords = _without_aliases(given)  # as they were: the first run may have changed the lists
            result = forward(*arguments, **keywords)
            _check_same(returned, tensors_in(result))
            return result

        again = SlowInFloat32.again()
        with set_checkpoint_early_stop(False):  # the second run must come to its end, to be compared
            try:
                return checkpoint(
                    once_more, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **keywords
                )
            except RuntimeError as error:
                if "saved tensor hooks" in str(error):
                    raise LoRunError(WITHIN_FUNC) from error
                raise

    return run


def _without_aliases(value: Any) -> Any:
    """The same tensors in lists, tuples and dicts of their own, which the stage may change."""
    return map_tensors(value, lambda tensor: tensor)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors_in(value)]


@torch.no_grad()
def _check_same(returned: list[tuple[Tensor, int]], again: list[Tensor]) -> None:
    """Check that a stage has returned the same again; what was changed in place since then cannot be compared.

    Raises:
        LoRunError: it has not.
    """
    if len(returned) != len(again):
        raise LoRunError(DIFFERENT)
    for (first, version), second in zip(returned, again):
        if first._version != version:
            continue
        if first.shape != second.shape or bool(relative_error(second, first) > SAME**2):
            raise LoRunError(DIFFERENT)


@contextmanager
def explaining(recomputed: bool) -> Iterator[None]:
    """In the block, a backward pass that fails, or cannot run a stage again, says why.

    Args:
        recomputed: whether stages run again.

    Raises:
        LoRunError: a tensor was changed in place that the backward pass needs, or a stage cannot run twice.
    """
    try:
        yield
    except RuntimeError as error:
        if not recomputed and "inplace operation" in str(error):
            raise LoRunError(IN_PLACE) from error
        if recomputed and ("inplace operation" in str(error) or "changed in place" in str(error)):
            raise LoRunError(CHANGED) from error
        if recomputed and (isinstance(error, CheckpointError) or "saved tensor hooks" in str(error)):
            raise LoRunError(DIFFERENT) from error
        raise
