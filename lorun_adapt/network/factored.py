"""Tensors that are products of two thin matrices: convolutions and linear maps use the two one after the other.

A k x k convolution whose kernel has rank r is a k x k convolution to r channels and then a 1 x 1 convolution. That
takes fewer operations than the dense kernel, and no kernel has to be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

VECTOR = 16  # channels that a CPU computes at once in single precision: a rank of 5 takes as long as one of 16
SHARE = 0.6  # of the dense tensor's operations: up to here, two maps are faster than one
SHARE_OF_HALF = 0.3  # the same in 16 bits, where matrix units make operations cheap compared with memory


def operations(matrix: tuple[int, int], rank: int) -> float:
    """Return the operations of the two maps as a fraction of those of the dense one.

    Args:
        matrix: (rows, columns) of the folded tensor.
        rank: counted in whole vectors.

    >>> operations((64, 576), rank=8), operations((64, 576), rank=16)
    (0.2777777777777778, 0.2777777777777778)
    """
    return math.ceil(rank / VECTOR) * VECTOR * sum(matrix) / math.prod(matrix)


def is_faster(matrix: tuple[int, int], rank: int) -> bool:
    """Whether two maps are faster than one dense map: at most ``SHARE`` of its operations.

    >>> is_faster((64, 576), rank=8), is_faster((16, 144), rank=4)
    (True, False)
    """
    return operations(matrix, rank) <= SHARE


class Factored(Tensor):
    """A tensor B A that was not multiplied out.

    It has the shape, dtype and device of the product. The functions of ``FAST`` use the factors; any other function
    gets the product. Code that takes tensors past ``__torch_function__``, such as ``torch.jit.script``, finds NaN.

    Attributes:
        lorun_b: (rows, rank).
        lorun_a: (rank, columns).
        lorun_shape: its shape.

    >>> weight = factored(torch.ones(4, 1), torch.ones(1, 6), (4, 6))
    >>> F.linear(torch.ones(6), weight)
    tensor([6., 6., 6., 6.])
    >>> weight.shape, (weight + 1).sum()
    (torch.Size([4, 6]), tensor(48.))
    """

    lorun_a: Tensor
    lorun_b: Tensor
    lorun_shape: tuple[int, ...]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        fast = FAST.get(func)
        result = None if fast is None else fast(*args, **kwargs)
        if result is not None:
            return result
        args = [_multiplied(value) for value in args]
        return func(*args, **{name: _multiplied(value) for name, value in kwargs.items()})


def factored(b: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the product ``b @ a`` in this shape, as a :class:`Factored`."""
    if torch.jit.is_tracing():  # which knows no subclasses
        return torch.mm(b, a).view(shape)
    if torch.compiler.is_compiling():
        if torch.compiler.is_dynamo_compiling():
            like = b.new_empty(()).expand(shape)
        else:  # torch.export has made b a subclass of its own
            with _disable_current_modes():
                like = torch.empty((), dtype=b.dtype, device=b.device).expand(shape)
    elif torch.is_grad_enabled() and (b.requires_grad or a.requires_grad):
        like = _Untouched.apply(b, a, shape)
    else:
        like = b.new_full((), math.nan).expand(shape)
    result = like.as_subclass(Factored)
    result.lorun_b, result.lorun_a, result.lorun_shape = b, a, shape
    return result


class _Untouched(torch.autograd.Function):
    """Stands for the product where nothing may read it: NaN, with the product's gradient.

    ``autograd.Function`` takes tensors past ``__torch_function__``, and gradients of the user's own functions must
    arrive.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(b: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
        return b.new_full((), math.nan).expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        b, a = ctx.saved_tensors
        gradient = gradient.reshape(len(b), a.shape[1])
        return gradient @ a.mH, b.mH @ gradient, None


def _multiplied(value: Any) -> Any:
    if type(value) is Factored:
        return torch.mm(value.lorun_b, value.lorun_a).view(value.lorun_shape)
    if type(value) in (list, tuple):
        return type(value)(map(_multiplied, value))
    return value


# --- functions that use the factors ---------------------------------------------------------------
#
# Each returns None where the dense tensor has to do.


def _serves(x: Any, weight: Any) -> bool:
    """Whether the factors are there, fold the first dimension against the rest, and pay in this precision."""
    if type(weight) is not Factored or not isinstance(x, Tensor) or type(x) is Factored:
        return False
    b, a = _factors(weight)
    if len(b) != weight.lorun_shape[0]:
        return False
    short = x.element_size() < 4 or torch.is_autocast_enabled(x.device.type)
    return not short or operations((len(b), a.shape[1]), len(a)) <= SHARE_OF_HALF


def _mix(x: Tensor, matrix: Tensor, bias: Tensor | None, convolve: Callable[..., Tensor], dims: int) -> Tensor:
    """Mix the channels of ``x`` by a matrix: convolve with a kernel of a single pixel."""
    plain = x.device.type == "cpu" and x.dim() == dims + 2 and x.is_contiguous() and not torch.compiler.is_compiling()
    if not plain:
        return convolve(x, matrix.reshape(*matrix.shape, *[1] * dims), bias)
    # On a CPU, a product of matrices takes half as long as oneDNN's convolution, which reorders x.
    many, flat = matrix.expand(len(x), -1, -1), x.flatten(2)
    mixed = torch.bmm(many, flat) if bias is None else torch.baddbmm(bias[:, None], many, flat)
    return mixed.view(len(x), len(matrix), *x.shape[2:])


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def run(
        input: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if groups != 1 or not _serves(input, weight):
            return None
        b, a = _factors(weight)
        first = a.view(len(a), *weight.lorun_shape[1:])
        hidden = convolve(input, first, None, stride, padding, dilation)
        return _mix(hidden, b, bias, convolve, first.dim() - 2)

    return run


def _transposed(convolve: Callable[..., Tensor], transpose: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def run(
        input: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        if groups != 1 or not _serves(input, weight):
            return None
        b, a = _factors(weight)
        second = a.view(len(a), *weight.lorun_shape[1:])
        hidden = _mix(input, b.mT, None, convolve, second.dim() - 2)
        return transpose(hidden, second, bias, stride, padding, output_padding, 1, dilation)

    return run


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not _serves(input, weight) or len(weight.lorun_shape) != 2:
        return None
    b, a = _factors(weight)
    return F.linear(F.linear(input, a), b, bias)


def _matmul(input: Any, other: Any = None, **further: Any) -> Tensor | None:
    """The product with a matrix that is factored on one side."""
    if further:  # such as a tensor to write to
        return None
    if _serves(input, other) and len(other.lorun_shape) == 2:
        b, a = _factors(other)
        return input @ b @ a
    if _serves(other, input) and len(input.lorun_shape) == 2 == other.dim():
        b, a = _factors(input)
        return b @ (a @ other)
    return None


def _factors(weight: Any) -> tuple[Tensor, Tensor]:
    return weight.lorun_b, weight.lorun_a


PLAIN = {  # what the tensor says of itself
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
}
FAST: Mapping[Any, Callable[..., Tensor | None]] = {
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.conv_transpose1d: _transposed(F.conv1d, F.conv_transpose1d),
    F.conv_transpose2d: _transposed(F.conv2d, F.conv_transpose2d),
    F.conv_transpose3d: _transposed(F.conv3d, F.conv_transpose3d),
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
}
