"""How far a network is from its teacher: in its output, and in what each stage hands on."""

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
TINY = 1e-20  # energy of an output that is zero, whose relative error must be a number still


class Distillation(nn.Module):
    """The loss of a student on one batch; a module, so that it can be spread over devices.

    Without ``loss`` it is the sum of the relative squared errors of the final output and of each stage's
    to the teacher's; each output is scaled by its own energy. With ``loss``, this takes the place of the
    error of the final output, and the stages count by their mean, as they are no longer all there is to learn.

    Args:
        student, teacher: networks with the same modules at the stages; both are run as they are.
        observer: knows what counts in what they return.
        loss: where there is ground truth, a callable on the student's output and the batch.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, observer: Observer, loss: Loss | None = None) -> None:
        super().__init__()
        self.student, self.observer = student, observer
        self._others = teacher, loss  # in a tuple: modules among them are not to be trained, moved or saved

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Every network that ``forward`` runs."""
        return self._others[0], self.student

    @property
    def reference(self) -> nn.Module:
        """The network whose rounding error in bfloat16 limits the training: the teacher."""
        return self._others[0]

    def forward(self, drawn: Callable[[], tuple[Any, ...]], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Both networks on a batch, drawing the same random numbers from ``seed``.

        Args:
            drawn: gives the batch; a function, since DDP takes the tuples that it knows apart.

        Returns:
            What to minimise; of this what is about the final output, without gradient; and PSNR of
            the final output to the teacher's in dB, whose largest value is the peak.
        """
        (teacher, loss), batch = self._others, drawn()
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
    """The mean PSNR of ``outputs`` to ``targets`` in dB; their peak is the largest absolute value in each target."""
    values = []
    for output, target in zip(outputs, targets):
        crest = target.abs().square().max() / target.abs().square().mean().clamp_min(TINY)
        values.append(10 * torch.log10(crest / relative_error(output, target).clamp_min(TINY)))
    return torch.stack(values).mean()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target||^2 / ||target||^2, in float32 or more."""
    target = target.detach()  # a forward that differentiates within itself gives it a graph of its own
    difference = output.to(torch.promote_types(output.dtype, torch.float32)) - target
    return _energy(difference) / _energy(target).clamp_min(TINY)


def _energy(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum()


def check_teacher(teacher: nn.Module, base: nn.Module) -> None:
    """Refuse a teacher that is not of the class of ``base``.

    Raises:
        LoRunError: no network, or one with other tensors.
    """
    if not isinstance(teacher, nn.Module):
        raise LoRunError(
            f"expected the original network as teacher, found {type(teacher).__name__}: pass the nn.Module"
        )
    shapes, expected = ({n: tuple(t.shape) for n, t, _ in tensors_of(net)} for net in (teacher, base))
    for name in (*expected, *shapes):
        if shapes.get(name) != expected.get(name):
            raise LoRunError(
                f"expected the network that was converted as teacher, found {name!r} of shape {shapes.get(name)} in "
                f"{type(teacher).__name__} and {expected.get(name)} in the conversion: pass the original, not wrapped"
            )
