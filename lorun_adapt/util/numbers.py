"""Tests of what a value is: a number, a whole number, or a tensor of numbers."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor


def double_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype of double precision for a tensor: float64, or complex128 for complex numbers.

    >>> double_of(torch.zeros(2, dtype=torch.bfloat16)), double_of(torch.zeros(2, dtype=torch.complex64))
    (torch.float64, torch.complex128)
    """
    return torch.complex128 if tensor.is_complex() else torch.float64


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float, and no bool.

    >>> is_number(2.5), is_number(True), is_number("2")
    (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole_number(value: object, least: int | None = None) -> bool:
    """Whether ``value`` is an int, no bool, and at least ``least``.

    >>> is_whole_number(2, least=1), is_whole_number(0, least=1), is_whole_number(2.0), is_whole_number(True)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_index(value: object) -> TypeGuard[SupportsIndex]:
    """Whether ``value`` can stand for an int, as numpy's whole numbers can, and is no bool.

    >>> import numpy
    >>> is_index(2), is_index(numpy.int64(2)), is_index(2.0), is_index(True)
    (True, True, False, False)
    """
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def is_numeric(value: Tensor | torch.dtype) -> bool:
    """Whether a tensor, or the tensors of a dtype, hold floating-point or complex numbers.

    >>> is_numeric(torch.zeros(2)), is_numeric(torch.complex64), is_numeric(torch.int64), is_numeric(torch.bool)
    (True, True, False, False)
    """
    dtype = value.dtype if isinstance(value, Tensor) else value
    return dtype.is_floating_point or dtype.is_complex


def without_nan(value: Any) -> Any:
    """Return nested dicts and lists with None in the place of NaN and Inf, which JSON does not have.

    >>> without_nan({"psnr": [float("inf"), 30.5], "name": "x"})
    {'psnr': [None, 30.5], 'name': 'x'}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
