"""Recompute the stages in the backward pass instead of keeping their intermediate results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import LoRunError
from ..util.nested import tensors_in

CHANGED = (
    "the network changes a stage's input in place, so the stage cannot run again in the backward pass: train without "
    "recompute"
)


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
        versions = [(tensor, tensor._version) for tensor in tensors_in((arguments, keywords))]
        runs = 0

        def once_more(*arguments: Any, **keywords: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs > 1 and any(tensor._version != version for tensor, version in versions):
                raise LoRunError(CHANGED)
            return forward(*arguments, **keywords)

        return checkpoint(once_more, *arguments, use_reentrant=False, **keywords)

    return run


@contextmanager
def explaining(recomputed: bool) -> Iterator[None]:
    """In the block, a backward pass that cannot run a stage again says so.

    Args:
        recomputed: whether stages run again; if not, errors pass as they are.

    Raises:
        LoRunError: a stage's input was changed in place after the stage took it.
    """
    try:
        yield
    except RuntimeError as error:
        if recomputed and ("inplace operation" in str(error) or "changed in place" in str(error)):
            raise LoRunError(CHANGED) from error
        raise
