"""."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The low-rank term of one tensor of one stage.

    ``lora_A`` has shape (rank, columns) and ``lora_B`` (rows, rank), where (rows, columns) is
    what the tensor folds to. ``scaling`` is PEFT's; the forward reads it as a tensor, since
    ``torch.compile`` would compile anew for each value of a number.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_parameter("lora_A", nn.Parameter(lora_A.contiguous()))
        self.register_parameter("lora_B", nn.Parameter(lora_B.contiguous()))
        self.scaling = scaling
        factor = None if scaling == 1 else torch.tensor(scaling, dtype=lora_B.dtype, device=lora_B.device)
        self.register_buffer("factor", factor, persistent=False)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, base: Tensor) -> Tensor:
        return _sum(base, self.lora_A, self.lora_B, self.factor)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, matrix=({self.lora_B.shape[0]}, {self.lora_A.shape[1]}), scaling={self.scaling:g}"


def _sum(base: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        b = b * factor
    if torch.is_autocast_enabled(base.device.type) or not base.is_contiguous():
        # The product may have a low precision, or another order of dimensions: the sum is to be as the base is.
        return base + (b @ a).view_as(base)
    return torch.mm(b, a).view_as(base).add_(base)


def untrained(matrix: tuple[int, int], rank: int, scaling: float, like: Tensor, generator: torch.Generator) -> LowRank:
    """A term that is zero and can be trained: B is zero, A drawn as in PEFT (Kaiming uniform)."""
    rows, columns = matrix
    bound = 1 / math.sqrt(columns)
    a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return LowRank(a.to(like), torch.zeros(rows, rank, dtype=like.dtype, device=like.device), scaling)
