"""Restore a large image tile by tile, where the network is local."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import LoRunError

LEAST_WEIGHT = 1e-3  # of a tile's outermost pixels, so that the weights never add up to zero


def in_tiles(images: Tensor, restore: Callable[[Tensor], Tensor], tile: int, overlap: int, unit: int) -> Tensor:
    """Restore ``images`` (B, C, H, W) in tiles that overlap, blended linearly; equal to the whole away from the seams.

    Args:
        images: what is measured and restored.
        restore: measures and restores a tile, and returns it in its shape.
        tile: the side of a tile, a multiple of ``unit``.
        overlap: by how many pixels tiles overlap at least, below ``tile``.
        unit: tiles start at multiples of this, such as the side of the blocks that the network measures.

    Raises:
        LoRunError: sides that do not fit.

    >>> images = torch.rand(1, 1, 20, 30)
    >>> torch.allclose(in_tiles(images, lambda tile: 2 * tile, tile=8, overlap=2, unit=1), 2 * images)
    True
    """
    if tile < unit or tile % unit:
        raise LoRunError(
            f"expected tiles of a multiple of {unit} pixels, the network's block size, found {tile}: choose such a side"
        )
    stride = (tile - overlap) // unit * unit
    if overlap < 0 or stride < 1:
        raise LoRunError(
            f"expected an overlap of 0 to {tile - unit} pixels for tiles of {tile}, found {overlap}: choose another one"
        )
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:1, :1])
    for top, bottom in _spans(images.shape[-2], tile, stride, unit):
        for left, right in _spans(images.shape[-1], tile, stride, unit):
            part = images[..., top:bottom, left:right]
            rows = _ramp(bottom - top, tile - stride, top > 0, bottom < images.shape[-2])
            columns = _ramp(right - left, tile - stride, left > 0, right < images.shape[-1])
            weight = rows[:, None] * columns
            total[..., top:bottom, left:right] += weight * restore(part)
            weights[..., top:bottom, left:right] += weight
    return total / weights


def _spans(length: int, tile: int, stride: int, unit: int) -> list[tuple[int, int]]:
    """Where tiles start and end. The last one is moved back so as not to be narrow, and may be a part of a unit longer.

    >>> _spans(70, 32, 24, 1), _spans(70, 32, 24, 8), _spans(20, 32, 24, 8)
    ([(0, 32), (24, 56), (38, 70)], [(0, 32), (24, 56), (32, 70)], [(0, 20)])
    """
    starts = list(range(0, max(1, length - tile + 1), stride))
    if starts[-1] + tile < length:
        starts.append((length - tile) // unit * unit)
    starts = sorted(set(starts))
    return [(start, length if start == starts[-1] else start + tile) for start in starts]


def _ramp(length: int, overlap: int, at_start: bool, at_end: bool) -> Tensor:
    """Weights of a tile's rows: 1, but rising over the overlap where another tile is."""
    weight = torch.ones(length)
    if overlap:
        rise = torch.linspace(LEAST_WEIGHT, 1, overlap + 2)[1:-1]
        size = min(overlap, length)
        if at_start:
            weight[:size] = torch.minimum(weight[:size], rise[:size])
        if at_end:
            weight[-size:] = torch.minimum(weight[-size:], rise[:size].flip(0))
    return weight
