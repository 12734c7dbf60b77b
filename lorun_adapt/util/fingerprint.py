"""A fingerprint of tensors, by which files name the base that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was changed in place, to see later whether one was.

    >>> running = torch.zeros(2)
    >>> before = versions_of([running])
    >>> versions_of([running.add_(1)]) == before
    False
    """
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 hash, in hexadecimal, of the names, shapes and values of ``tensors``.

    The order of the tensors does not matter, nor whether a floating-point value is stored as float16 or float32.

    >>> half = fingerprint_of({"a": torch.ones(2, dtype=torch.float16), "b": torch.zeros(1)})
    >>> half == fingerprint_of({"b": torch.zeros(1), "a": torch.ones(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        tensor = tensor.resolve_conj().resolve_neg()  # without these, a view of its bytes fails
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
