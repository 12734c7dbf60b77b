"""Run in float32 those convolutions that CPUs run more slowly in bfloat16.

The gradients of a convolution with large blocks side by side, which is how networks for compressive sensing measure
images, take oneDNN up to hundreds of times as long in bfloat16 (torch 2.14, CPUs with AMX). Large depthwise kernels
take two to three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE_BLOCK = 16  # the side of a block, in pixels, up to which bfloat16 is as fast as float32
LARGE_DEPTHWISE = 3  # the same of a depthwise kernel

CONVOLUTIONS = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
WEIGHT, STRIDE, GROUPS = 1, 3, 6  # their places among the positional arguments of all of these


class SlowConvolutionsInFloat32(TorchFunctionMode):
    """Within the block, convolutions that are slow in bfloat16 run in float32, whatever autocast says.

    Example:
        >>> images, blocks = torch.rand(1, 1, 64, 64), torch.rand(8, 1, 32, 32)
        >>> with torch.autocast("cpu", torch.bfloat16), SlowConvolutionsInFloat32():
        ...     torch.conv2d(images, blocks, stride=32).dtype, torch.conv2d(images, blocks).dtype
        (torch.float32, torch.bfloat16)
    """

    _entered = 0  # a backward pass runs in no mode, so those who run a stage again in it need to know

    def __enter__(self) -> SlowConvolutionsInFloat32:
        SlowConvolutionsInFloat32._entered += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        SlowConvolutionsInFloat32._entered -= 1
        super().__exit__(*raised)

    @classmethod
    def again(cls) -> AbstractContextManager[object]:
        """What a stage has to run in that shall run again later as it does now."""
        return cls() if cls._entered else nullcontext()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in CONVOLUTIONS or not _is_slow(args, kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_in_float32, args), **{name: _in_float32(value) for name, value in kwargs.items()})


def _is_slow(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    kernel = args[WEIGHT] if len(args) > WEIGHT else kwargs["weight"]
    groups = args[GROUPS] if len(args) > GROUPS else kwargs.get("groups", 1)
    sides = kernel.shape[2:]
    if kernel.device.type != "cpu":
        return False
    if groups > 1 and kernel.shape[1] == 1 and max(sides) > LARGE_DEPTHWISE:
        return True
    stride = args[STRIDE] if len(args) > STRIDE else kwargs.get("stride", 1)
    steps = stride if isinstance(stride, Sequence) else [stride] * len(sides)
    return any(step > 1 and side > LARGE_BLOCK for step, side in zip(steps, sides))


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
