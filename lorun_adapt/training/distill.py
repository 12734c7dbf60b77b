"""The distillation loss: the distance to the teacher in the final output and in the outputs of the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.observe import Observer
from ..util.modules import tensors_of
from ..util.nested import device_of, to_device
from ..util.seeds import seeded

Loss = Callable[[Any, Any], Tensor]  # (output of the network, the batch) -> a number
TINY = 1e-20  # lower limit of an energy, to avoid dividing by zero


class Distillation(nn.Module):
    """The loss of a student on one batch. It is a module so that DDP can distribute it.

    Without ``loss``, it is the sum of the relative squared errors of the final output and of the output of each stage,
    each relative to the energy of the teacher's output. With ``loss``, that replaces the error of the final output, and
    the errors of the stages are averaged instead of summed, so that they do not outweigh it.

    Args:
        student: the network to train.
        teacher: a network with the same modules at the stages.
        observer: selects the outputs to compare.
        loss: with ground truth, a callable ``loss(output, batch)``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, observer: Observer, loss: Loss | None = None) -> None:
        super().__init__()
        self.student, self.observer = student, observer
        self._others = teacher, loss  # in a tuple, so that they are not registered, trained, moved or saved

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that ``forward`` runs."""
        return self._others[0], self.student

    @property
    def reference(self) -> nn.Module:
        """The network whose rounding error in bfloat16 limits the training: the teacher."""
        return self._others[0]

    def forward(self, draw: Callable[[], tuple[Any, ...]], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run both networks on a batch with the same random numbers.

        Args:
            draw: returns the batch. It is a function because DDP takes apart the containers it knows.
            seed: seed of the random numbers of both networks.

        Returns:
            The loss to minimise; its part for the final output, detached; and the PSNR of the final output to the
            teacher's in dB, as in :func:`psnr_to`.
        """
        (teacher, loss), batch = self._others, draw()
        with torch.no_grad():
            target = self.observer.run(teacher, batch, seed)
        own = self.observer.run(self.student, batch, seed)
        if loss is None:
            final = torch.stack([relative_error(a, b) for a, b in zip(own.final, target.final)]).mean()
        else:
            with seeded(seed):
                final = loss(own.whole, to_device(batch, device_of(self.student)))
        total = final
        if own.stages:
            between = torch.stack([relative_error(a, b) for a, b in zip(own.stages, target.stages)])
            total = total + (between.sum() if loss is None else between.mean())
        return total, final.detach(), psnr_to(own.final, target.final)


@torch.no_grad()
def psnr_to(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the mean PSNR of ``outputs`` to ``targets`` in dB; the peak is each target's largest absolute value."""
    values = []
    for output, target in zip(outputs, targets):
        crest = target.abs().square().max() / target.abs().square().mean().clamp_min(TINY)
        values.append(10 * torch.log10(crest / relative_error(output, target).clamp_min(TINY)))
    return torch.stack(values).mean()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return ||output - target||^2 / ||target||^2, computed in float32 or higher precision."""
    target = target.detach()  # a forward that uses autograd internally returns a graph even under no_grad
    difference = output.to(torch.promote_types(output.dtype, torch.float32)) - target
    return _energy(difference) / _energy(target).clamp_min(TINY)


def _energy(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum()


def check_teacher(teacher: nn.Module, base: nn.Module) -> None:
    """Raise an error unless ``teacher`` has the same tensors as ``base``.

    Raises:
        LoRunError: not a network, or tensors of other names or shapes.
    """
    if not isinstance(teacher, nn.Module):
        raise LoRunError(
            f"expected the original network as teacher, found {type(teacher).__name__}: pass the nn.Module"
        )
    shapes, expected = ({n: tuple(t.shape) for n, t, _ in tensors_of(net)} for net in (teacher, base))
    for name in (*expected, *shapes):
        if shapes.get(name) != expected.get(name):
            raise LoRunError(
                f"expected the original network as teacher, found {name!r} of shape {shapes.get(name)} in "
                f"{type(teacher).__name__} and {expected.get(name)} in the conversion: pass the original, not wrapped"
            )
