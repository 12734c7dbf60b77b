"""The matrix that a tensor is folded to, of which a low-rank term has two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

DEFAULT_RANK = 8
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)  # their weights fold as in PEFT


def fold(shape: Sequence[int], owner: type[nn.Module] | None = None) -> tuple[int, int]:
    """Return the (rows, columns) of the matrix that a tensor of ``shape`` is folded to.

    The weight of a linear, convolution, embedding or bilinear layer folds as in PEFT: the first dimension against the
    rest. Other tensors fold where rows + columns, and so a pair of factors, is smallest.

    Args:
        shape: the tensor's shape; one with fewer than two dimensions folds to a single column.
        owner: the class of the layer of which the tensor is the weight; None where it is another tensor.

    >>> fold((32, 16, 3, 3), nn.Conv2d), fold((1, 1, 2, 8, 8)), fold((32,))
    ((32, 144), (16, 8), (32, 1))
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
    """Return how many numbers the two factors of a (rows, columns) matrix have at ``rank``.

    >>> pair_size((32, 144), rank=8)
    1408
    """
    return rank * sum(matrix)
