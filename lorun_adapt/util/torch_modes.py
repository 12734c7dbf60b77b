"""Run code in torch modes of its own, whatever modes the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def torch_modes() -> Iterator[None]:
    """Within the block, autograd is on, and autocast and inference mode are off.

    Weights that are computed under autocast are rounded for good; those made in inference mode can't be trained.

    >>> with torch.inference_mode(), torch.autocast("cpu"), torch_modes():
    ...     print((torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)).dtype, torch.is_grad_enabled())
    torch.float32 True
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def in_own_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run ``function`` within :func:`torch_modes`.

    >>> @in_own_modes
    ... def product(a, b):
    ...     return a @ b
    >>> with torch.autocast("cpu"):
    ...     product(torch.ones(2, 2), torch.ones(2, 2)).dtype
    torch.float32
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch_modes():
            return function(*args, **kwargs)

    return run
