"""The tensors that a run trains, with their optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from pytorch_optimizer import SOAP
from torch import Tensor, nn

from ..errors import LoRunError
from ..util.energy import root_mean_square
from ..util.nested import to_device
from .trained import TrainedTensor

MIN_RMS = 0.01  # a tensor's learning rate is relative to its values, or to this where they are smaller
MAX_SIDE = 512  # of a tensor that SOAP preconditions; it skips longer dimensions


class Optimised:
    """Tensors that SOAP trains in place.

    Args:
        trained: the tensors with their learning rates, in an order that is the same in each run.
        accelerator: prepares the optimiser.

    Raises:
        LoRunError: a tensor has 16 bits only.
    """

    def __init__(self, trained: Sequence[TrainedTensor], accelerator: Accelerator) -> None:
        for item in trained:
            if item.parameter.dtype in (torch.float16, torch.bfloat16):
                raise LoRunError(
                    f"expected tensors of 32 bits or more to train, found {item.parameter.dtype}: convert in float32, "
                    "and save with save_pretrained(path, dtype=torch.float16) afterwards"
                )
        self.parameters = [item.parameter for item in trained]
        self._beside = list({id(tensor): tensor for item in trained for tensor in item.beside}.values())
        self._relative = [item.rate for item in trained]
        self._sizes = [item.size or MIN_RMS for item in trained]
        self._accelerator = accelerator
        # SOAP does not support complex tensors: it trains views of them as pairs of real numbers.
        self._tensors = [nn.Parameter(torch.view_as_real(p.detach())) if p.is_complex() else p for p in self.parameters]
        self.set_rates()
        groups = [{"params": [tensor]} for tensor in self._tensors]  # each step sets their learning rates
        self._optimizer = SOAP(groups, weight_decay=0.0, max_precondition_dim=MAX_SIDE)
        self._prepared: Any = accelerator.prepare(self._optimizer)
        self.clear_gradients()

    def set_rates(self) -> None:
        """Set the learning rates relative to the values that the tensors have now."""
        sizes = [root_mean_square(parameter) for parameter in self.parameters]
        sizes = [max(size, MIN_RMS) if size else if_zero for size, if_zero in zip(sizes, self._sizes)]
        self._rates = [rate * size for rate, size in zip(self._relative, sizes)]

    def restart(self) -> None:
        """Forget the gradients and what the optimiser knows of earlier ones."""
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            group.pop("step", None)
        self.clear_gradients()

    def step(self, scale: float) -> None:
        """Change the tensors by their gradients, with the learning rates times ``scale``; clear the gradients."""
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * scale
        for parameter, tensor in zip(self.parameters, self._tensors):
            if tensor is not parameter:
                gradient, parameter.grad = parameter.grad, None
                tensor.grad = None if gradient is None else torch.view_as_real(gradient)
        self._prepared.step()
        self._optimizer.zero_grad()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients_are_finite(self) -> bool:
        """Whether no gradient has NaN or Inf; scaled gradients, which the accelerator checks, count as finite."""
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        scaled = self._accelerator.scaler is not None
        return scaled or not norms or bool(torch.isfinite(torch.stack(norms)).all())

    @property
    def changing(self) -> list[Tensor]:
        """The tensors, and those that belong to their values."""
        return [*self.parameters, *self._beside]

    def values(self) -> list[Tensor]:
        """Return copies of the tensors, and of those that belong to their values."""
        return [tensor.detach().clone() for tensor in self.changing]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """Give the tensors the values that :meth:`values` returned."""
        for tensor, value in zip(self.changing, values):
            tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs, for the state file."""
        return {
            "values": self.values(),
            "rates": self._rates,
            "optimizer": [self._optimizer.state.get(tensor, {}) for tensor in self._tensors],
            "counts": [group.get("step", 0) for group in self._optimizer.param_groups],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` returned."""
        self._rates = state["rates"]
        self.put(state["values"])
        for tensor, group, moments, count in zip(
            self._tensors, self._optimizer.param_groups, state["optimizer"], state["counts"]
        ):
            group["step"] = count
            if moments:
                self._optimizer.state[tensor].update(to_device(moments, tensor.device))
