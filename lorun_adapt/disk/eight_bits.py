"""Tensors in eight bits: whole numbers from -127 to 127, and a scale for each channel.

A file holds them as two tensors: ``name``, int8, and ``name:scale``, bfloat16. A number times its scale is the value.
The scale has so few digits that this product is exact in float32. So what was loaded is saved as the same bytes again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ":scale"  # no parameter has this in its name
LARGEST = 127
ENTRY = 128  # bytes that the scales of a tensor take in the header of a file


def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store for ``tensor``: it and its scales, or the unchanged tensor where that is smaller.

    There is one scale for each output channel (row) of a weight, or for each column if it has fewer columns than rows:
    a factor B then has one for each rank, as A has.

    >>> stored = pack("weight", torch.tensor([[4.0, -1.0], [0.5, 0.25]]).repeat(4, 8))
    >>> {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    {'weight': (torch.int8, (8, 16)), 'weight:scale': (torch.bfloat16, (8, 1))}

    Args:
        name: of the tensor.
        tensor: any tensor with finite values. Only real floating-point tensors with two or more dimensions are packed.
    """
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return {name: tensor}
    side = 1 if 1 < tensor.shape[1] < tensor.shape[0] else 0
    if tensor.numel() + 2 * tensor.shape[side] + ENTRY >= tensor.nbytes:
        return {name: tensor}
    exact = tensor.double()
    largest = exact.abs().amax([d for d in range(tensor.ndim) if d != side], keepdim=True)
    scale = (largest / LARGEST).to(torch.bfloat16)
    values = torch.where(scale > 0, exact / scale.double(), 0).round().clamp(-LARGEST, LARGEST)
    return {name: values.to(torch.int8), name + SCALE: scale}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the packed ones as float32.

    >>> weight = torch.tensor([[4.0, -1.0], [0.5, 0.25]]).repeat(4, 8)
    >>> again = unpack(pack("weight", weight))["weight"]
    >>> bool((again - weight).abs().max() < 0.02)
    True
    """
    result = {}
    for name, tensor in tensors.items():
        if (scale := tensors.get(name + SCALE)) is not None:
            result[name] = tensor.float() * scale.float()
        elif name.removesuffix(SCALE) not in tensors or not name.endswith(SCALE):
            result[name] = tensor
    return result


def is_scale(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` can be the scales of a tensor of the shape ``of``.

    >>> is_scale((8, 1, 1), (8, 4, 3)), is_scale((4,), (8, 4, 3))
    (True, False)
    """
    return len(shape) == len(of) and all(side in (1, whole) for side, whole in zip(shape, of))
