"""."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

DEFAULT_RANK = 8


LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)


def fold(shape: Sequence[int], owner: type[nn.Module] | None = None) -> tuple[int, int]:
    """The matrix (rows, columns) that a tensor of ``shape`` is folded to.

    Weights of linear and convolution layers fold as in PEFT: the first dimension against the
    rest. Other tensors fold where rows + columns, and so a low-rank pair, is smallest.
    """
    size = math.prod(shape)
    if len(shape) < 2 or size == 0:
        return size, 1
    if owner is not None and issubclass(owner, LAYERS):
        return shape[0], size // shape[0]
    rows = [math.prod(shape[:split]) for split in range(1, len(shape))]
    best = min(rows, key=lambda count: count + size // count)
    return best, size // best


def pair_size(matrix: tuple[int, int], rank: int) -> int:
    """Numbers in the factors of a (rows, columns) matrix at ``rank``."""
    return rank * sum(matrix)
