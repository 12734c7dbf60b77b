"""The energy of a tensor, and relative errors."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-20  # lower limit of an energy, to avoid dividing by zero


def energy(tensor: Tensor) -> Tensor:
    """Return the squared norm of a real or complex tensor, computed in float32 or higher precision.

    >>> float(energy(torch.tensor([3 + 4j, 2])))
    29.0
    """
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum()


def root_mean_square(tensor: Tensor) -> float:
    """Return the root of the mean squared magnitude of a real or complex tensor.

    >>> root_mean_square(torch.tensor([3 + 4j, 5]))
    5.0
    """
    return float(tensor.detach().abs().square().mean().sqrt())


def squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """Return ||output - target||^2, computed in float32 or higher precision; no gradient passes to ``target``.

    >>> float(squared_distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])))
    1.0
    """
    # Detached, since a forward that uses autograd internally returns a graph even under no_grad.
    return energy(output.to(torch.promote_types(output.dtype, torch.float32)) - target.detach())


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return ||output - target||^2 / ||target||^2, computed in float32 or higher precision.

    >>> float(relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])))
    0.5
    """
    return squared_distance(output, target) / energy(target.detach()).clamp_min(TINY)
