"""Which numbers a value holds."""

from __future__ import annotations

import torch
from torch import Tensor


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_numeric(value: Tensor | torch.dtype) -> bool:
    """Whether a tensor, or tensors of a dtype, hold floating-point or complex numbers."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return dtype.is_floating_point or dtype.is_complex
