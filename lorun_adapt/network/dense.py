"""Dense tensors of a stage, computed from the base and an adapter, and weighted sums of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import Group
from ..util.modules import tensor_of
from ..util.numbers import is_numeric
from .adapter import StageAdapter, private_tensors, terms_of
from .eight_bits import as_floats


def dense_tensors(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> dict[str, Tensor]:
    """Return the tensors of a stage by name, computed from the base ``denoiser`` and the stage's adapter."""
    terms, private = terms_of(adapter), private_tensors(adapter)
    with torch.no_grad():
        return {
            spec.name: as_floats(private[spec.name].detach())
            if spec.name in private
            else terms[spec.name](tensor_of(denoiser, spec.name)).detach()
            for spec in group.tensors
            if not spec.common
        }


@torch.no_grad()
def weighted_sum_of_tensors(base: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    """Return the base plus the weighted sum of the differences of ``values`` from it.

    Raises:
        LoRunError: integer or boolean tensors that differ.

    >>> import torch
    >>> from lorun_adapt.network.dense import weighted_sum_of_tensors
    >>> base, values = torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([4.0])]
    >>> weighted_sum_of_tensors(base, values, [0.5, 0.5], "bias")
    tensor([3.])
    """
    base, values = as_floats(base), [as_floats(value) for value in values]
    numeric = is_numeric(base)
    alike = all(torch.equal(value, values[0]) for value in values)
    if alike and (not numeric or math.isclose(sum(weights), 1.0)):
        return values[0].clone()
    if name.endswith("num_batches_tracked"):  # by batch norms, in their running means
        return torch.stack(list(values)).amax(0)
    if not numeric:
        raise LoRunError(
            f"cannot sum the adapters: {name!r} holds whole numbers that differ between them; sum adapters in which "
            "they are equal"
        )
    exact = torch.promote_types(base.dtype, torch.float32)
    total = base.detach().to(exact).clone()
    for weight, value in zip(weights, values):
        total += weight * (value.to(exact) - base.detach().to(exact))
    return total.to(base.dtype)


def check_merged(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check the values of merged tensors.

    Raises:
        LoRunError: a tensor has NaN or Inf.
    """
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise LoRunError(f"the merged {name!r} has NaN or Inf: merge sets from before training diverged")
