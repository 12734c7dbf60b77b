"""How far a network is from the truth, in the place of a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..network.observe import Observer
from ..util.nested import device_of, to_device
from ..util.seeds import seeded
from .distill import Loss


class Supervised(nn.Module):
    """The loss of a network on one batch that holds the truth; it takes the place of a :class:`Distillation`.

    Args:
        student: the network, run as it is.
        observer: runs it.
        loss: a callable on its output and the batch.
    """

    def __init__(self, student: nn.Module, observer: Observer, loss: Loss) -> None:
        super().__init__()
        self.student, self.observer = student, observer
        self._loss = (loss,)  # in a tuple: a module is not to be trained, moved or saved

    @property
    def teacher(self) -> nn.Module:
        return self.student

    def forward(self, drawn: Callable[[], tuple[Any, ...]], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """What to minimise, the same without gradient, and NaN for the PSNR to a teacher, of which there is none."""
        batch = drawn()
        output = self.observer.run(self.student, batch, seed).whole
        with seeded(seed):
            loss = self._loss[0](output, to_device(batch, device_of(self.student)))
        return loss, loss.detach(), torch.tensor(math.nan)
