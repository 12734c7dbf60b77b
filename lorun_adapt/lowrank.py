"""A stage's tensor as the shared base plus a low-rank term: W_k = W_0 + B_k A_k.

Any tensor is folded to a matrix first. The term is added where the tensor is read, by
``torch.nn.utils.parametrize``, so that modules keep their identity, class and attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


class LowRank(nn.Module):
    """The low-rank term of one tensor of one stage, as a parametrization.

    ``lora_A`` has shape (rank, columns) and ``lora_B`` (rows, rank), where (rows, columns) is
    what the tensor folds to. ``scaling`` is PEFT's; the forward reads it as a tensor, since
    ``torch.compile`` would compile anew for each value of a number.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A.contiguous())
        self.lora_B = nn.Parameter(lora_B.contiguous())
        self.scaling = scaling
        factor = None if scaling == 1 else torch.tensor(scaling, dtype=lora_B.dtype, device=lora_B.device)
        self.register_buffer("factor", factor, persistent=False)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, base: Tensor) -> Tensor:
        b = self.lora_B if self.factor is None else self.lora_B * self.factor
        # Not addmm: under autocast it would return the low precision for base as well.
        return base + (b @ self.lora_A).view(base.shape)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, matrix=({self.lora_B.shape[0]}, {self.lora_A.shape[1]}), scaling={self.scaling:g}"


def untrained(matrix: tuple[int, int], rank: int, scaling: float, like: Tensor, generator: torch.Generator) -> LowRank:
    """A term that is zero and can be trained: B is zero, A drawn as in PEFT (Kaiming uniform)."""
    rows, columns = matrix
    bound = 1 / math.sqrt(columns)
    a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return LowRank(a.to(like), torch.zeros(rows, rank, dtype=like.dtype, device=like.device), scaling)
