"""The loss of a network against the ground truth, where there is no teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..network.observe import Observer
from ..util.nested import device_of, to_device
from ..util.seeds import seeded
from .distill import Example, Loss
from .recompute import recomputing


class Supervised(nn.Module):
    """The loss of a network on one batch that holds the ground truth; trained like a :class:`Distillation`.

    Args:
        student: the network to train, run in the mode that it is in.
        observer: runs the network.
        loss: a function of the network's output and the batch.
        recomputed: modules of the network to run again in the backward pass, to save memory.
    """

    def __init__(
        self, student: nn.Module, observer: Observer, loss: Loss, recomputed: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.student, self.observer = student, observer
        self.recomputed = tuple(recomputed)
        self._loss = (loss,)  # in a tuple: a loss that is a module is not to be trained, moved or saved

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Every network that ``forward`` runs."""
        return (self.student,)

    @property
    def reference(self) -> nn.Module:
        """The network whose rounding error in bfloat16 limits the training; there is only one here."""
        return self.student

    def example(self, batch: tuple[Any, ...], seed: int) -> Example:
        """A batch with the seed for it."""
        return Example(batch, seed)

    def is_reusable(self, example: Example) -> bool:
        """No: there is no teacher whose outputs could be kept."""
        return False

    def forward(self, draw: Callable[[], Example]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss on an example.

        Args:
            draw: returns the example. It is a function because DDP takes apart the containers it knows.

        Returns:
            The loss; the loss without gradient; NaN in the place of a PSNR to the teacher.
        """
        batch, seed, _ = draw()
        with recomputing(self.recomputed):
            output = self.observer.run(self.student, batch, seed).whole
        with seeded(seed):
            loss = self._loss[0](output, to_device(batch, device_of(self.student)))
        return loss, loss.detach(), torch.tensor(math.nan)
