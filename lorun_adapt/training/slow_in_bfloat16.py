"""Run in float32 those operations that CPUs run more slowly in bfloat16.

The gradients of a convolution with large blocks side by side, which is how networks for compressive sensing measure
images, take oneDNN up to hundreds of times as long in bfloat16 (torch 2.14, CPUs with AMX). Large depthwise kernels
take two to three times as long, and attention up to six times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE_BLOCK = 16  # the side of a block, in pixels, up to which bfloat16 is as fast as float32
LARGE_DEPTHWISE = 3  # the same of a depthwise kernel

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
WEIGHT, STRIDE, GROUPS = 1, 3, 6  # their places among the positional arguments of all of these


class _Threads(threading.local):
    entered = 0  # modes that are open


_threads = _Threads()


class SlowInFloat32(TorchFunctionMode):
    """Within the block, operations on the CPU that are slow in bfloat16 run in float32 where autocast is on.

    Example:
        >>> images, blocks = torch.rand(1, 1, 64, 64), torch.rand(8, 1, 32, 32)
        >>> with torch.autocast("cpu", torch.bfloat16), SlowInFloat32():
        ...     torch.conv2d(images, blocks, stride=32).dtype, torch.conv2d(images, blocks).dtype
        (torch.float32, torch.bfloat16)
    """

    def __enter__(self) -> SlowInFloat32:
        _threads.entered += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        _threads.entered -= 1
        super().__exit__(*raised)

    @staticmethod
    def again() -> AbstractContextManager[object]:
        """Return the context in which the backward pass must run a stage again: this mode, if it is active now."""
        return SlowInFloat32() if _threads.entered else nullcontext()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_slow(func, args, kwargs) or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_in_float32, args), **{name: _in_float32(value) for name, value in kwargs.items()})


def _is_slow(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if func is F.scaled_dot_product_attention:
        query: Tensor = args[0] if args else kwargs["query"]
        return query.device.type == "cpu"
    if func not in CONVOLUTIONS and func not in TRANSPOSED:
        return False
    kernel: Tensor = args[WEIGHT] if len(args) > WEIGHT else kwargs["weight"]
    groups: int = args[GROUPS] if len(args) > GROUPS else kwargs.get("groups", 1)
    stride: Any = args[STRIDE] if len(args) > STRIDE else kwargs.get("stride", 1)
    if kernel.device.type != "cpu":
        return False
    sides = kernel.shape[2:]
    depthwise = groups > 1 and (kernel.shape[0] == groups if func in TRANSPOSED else kernel.shape[1] == 1)
    if depthwise and max(sides) > LARGE_DEPTHWISE:
        return True
    strides = list(stride) if isinstance(stride, Sequence) else [stride]
    if len(strides) == 1:
        strides *= len(sides)
    return any(step > 1 and side > LARGE_BLOCK for step, side in zip(strides, sides))


def _in_float32(value: Any) -> Any:
    short = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if short else value
