"""Tensors in eight bits: whole numbers from -127 to 127, and a scale for each channel.

A file holds the numbers as int8 under the tensors' names, and the scales of all these tensors as one of bfloat16, in
the order of the names: one for each row of a tensor, or for each column if it has fewer columns than rows. So a factor
B has a scale for each rank, as A has. A number times its scale is the value. The scale has so few digits that this
product is exact in float32, and what was loaded is saved as the same bytes again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

SCALES = ":scales"  # the name of the scales in a file; no parameter has a colon in its name
LARGEST = 127


def pack(tensors: Mapping[str, Tensor], exact: Collection[str] = ()) -> dict[str, Tensor]:
    """Return what to store for the tensors of a file.

    >>> stored = pack({"weight": torch.randn(8, 16), "bias": torch.zeros(8)})
    >>> {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    {'weight': (torch.int8, (8, 16)), 'bias': (torch.float32, (8,)), ':scales': (torch.bfloat16, (8,))}

    Args:
        tensors: by name, with finite values. Real floating-point tensors with two or more dimensions are packed if that
            makes them smaller.
        exact: names of the tensors that stay as they are.
    """
    result, scales = dict(tensors), []
    for name in sorted(tensors.keys() - exact):
        packed = quantised(tensors[name])
        if packed is not None:
            result[name], scale = packed
            scales.append(scale.flatten())
    return {**result, SCALES: torch.cat(scales)} if scales else result


def unpack(tensors: Mapping[str, Tensor], packed: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a file, with those of the names ``packed`` as float32.

    >>> weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    >>> again = unpack(pack({"weight": weight}), ["weight"])["weight"]
    >>> bool((again - weight).abs().max() < 0.02)
    True
    """
    result = {name: tensor for name, tensor in tensors.items() if name != SCALES}
    names = sorted(packed)
    lengths = [number_of_scales({name: tensors[name].shape}) for name in names]
    for name, scale in zip(names, tensors[SCALES].split(lengths) if names else ()):
        shape = [1] * tensors[name].ndim
        shape[_side(tensors[name].shape)] = -1
        result[name] = dequantised(tensors[name], scale.view(shape), torch.float32)
    return result


def quantised(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a tensor's whole numbers, int8, and its scales, bfloat16, which broadcast to its shape.

    None for a tensor that stays as it is: one that holds no floating-point numbers, has fewer than two dimensions, or
    would not become smaller.

    >>> numbers, scales = quantised(torch.randn(8, 16, 3, 3))
    >>> tuple(numbers.shape), tuple(scales.shape)
    ((8, 16, 3, 3), (8, 1, 1, 1))
    """
    if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        return None
    side = _side(tensor.shape)
    if tensor.numel() + 2 * tensor.shape[side] >= tensor.nbytes:
        return None
    return rounded(tensor)


def rounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the whole numbers and scales of a tensor with two or more dimensions, as :func:`quantised` does."""
    side = _side(tensor.shape)
    value = tensor.double()
    largest = value.abs().amax([d for d in range(tensor.ndim) if d != side], keepdim=True)
    scale = (largest / LARGEST).to(torch.bfloat16)
    numbers = torch.where(scale > 0, value / scale.double(), 0).round().clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


def dequantised(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of whole numbers with their scales.

    >>> dequantised(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]), torch.float32)
    tensor([[ 1., -2.]])
    """
    return (numbers * scales.float()).to(dtype)


def number_of_scales(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many scales packed tensors of these shapes have together.

    >>> number_of_scales({"a": (4, 16, 3, 3), "b": (16, 4)})
    8
    """
    return sum(shape[_side(shape)] for shape in shapes.values())


def _side(shape: tuple[int, ...]) -> int:
    """The dimension along which a tensor of two or more dimensions has scales."""
    return 1 if 1 < shape[1] < shape[0] else 0
