"""The distillation loss: the distance to the teacher in the final output and in the outputs of the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.observe import Observer, Outputs
from ..network.recording import SAME
from ..util.energy import TINY, relative_error
from ..util.modules import tensors_of
from ..util.nested import device_of, to_device
from ..util.seeds import seeded
from .recompute import recomputing

Loss = Callable[[Any, Any], Tensor]  # (output of the network, the batch) -> a number


class Example(NamedTuple):
    """What a loss is computed on.

    Attributes:
        batch: the arguments of the networks, and what the loss takes beyond them.
        seed: of the random numbers that the networks and the loss draw.
        target: the outputs of the teacher, if there is one.
    """

    batch: tuple[Any, ...]
    seed: int
    target: Outputs | None = None


class Distillation(nn.Module):
    """The loss of a student on one batch. It is a module so that DDP can distribute it.

    Without ``loss``, it is the sum of the relative squared errors of the final output and of the output of each stage,
    each relative to the energy of the teacher's output. With ``loss``, that replaces the error of the final output.

    The stages only guide: together they count at most as much as the final output, and less and less as training goes
    on. A small network can come close to the teacher's final output without coming close to all that leads to it.

    Args:
        student: the network to train.
        teacher: a network with the same modules at the stages.
        observer: selects the outputs to compare.
        loss: with ground truth, a callable ``loss(output, batch)``.
        recomputed: modules of the student to run again in the backward pass, to save memory.

    Attributes:
        guidance: the factor of the stages' errors, in [0, 1].
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        observer: Observer,
        loss: Loss | None = None,
        recomputed: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.student, self.observer = student, observer
        self.recomputed = tuple(recomputed)
        self.guidance = 1.0
        self._others = teacher, loss  # in a tuple, so that they are not registered, trained, moved or saved

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The teacher and the student."""
        return self._others[0], self.student

    @property
    def reference(self) -> nn.Module:
        """The network whose rounding error in bfloat16 limits the training: the teacher."""
        return self._others[0]

    @torch.no_grad()
    def example(self, batch: tuple[Any, ...], seed: int) -> Example:
        """Run the teacher on a batch."""
        outputs = self.observer.run(self._others[0], batch, seed)
        # Copies, as the network may use its buffers again; without the graph that some forwards record regardless.
        final, stages = [t.detach().clone() for t in outputs.final], [t.detach() for t in outputs.stages]
        return Example(batch, seed, Outputs(None, final, stages))

    @torch.no_grad()
    def is_reusable(self, example: Example) -> bool:
        """Whether the teacher returns the same again, so that what it returned holds for more than one step."""
        assert example.target is not None
        again, known = self.observer.run(self._others[0], example.batch, example.seed), example.target
        pairs = zip([*again.final, *again.stages], [*known.final, *known.stages])
        return all(bool(relative_error(a, b) <= SAME) for a, b in pairs)

    def forward(self, draw: Callable[[], Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the student on an example, with the random numbers that the teacher drew.

        Args:
            draw: returns the example. It is a function because DDP takes apart the containers it knows.

        Returns:
            The loss to minimise; its part for the final output, detached; and the PSNR of the final output to the
            teacher's in dB, as in :func:`psnr_to`.
        """
        loss, (batch, seed, target) = self._others[1], draw()
        assert target is not None
        with recomputing(self.recomputed):
            own = self.observer.run(self.student, batch, seed)
        check_shapes(own, target)
        if loss is None:
            final = torch.stack([relative_error(a, b) for a, b in zip(own.final, target.final)]).mean()
        else:
            with seeded(seed):
                final = loss(own.whole, to_device(batch, device_of(self.student)))
        total = final
        if own.stages and self.guidance:
            between = torch.stack([relative_error(a, b) for a, b in zip(own.stages, target.stages)]).sum()
            most = final.detach().abs() / between.detach().clamp_min(TINY)
            total = total + self.guidance * most.clamp_max(1.0) * between
        return total, final.detach(), psnr_to(own.final, target.final)


def check_shapes(own: Outputs, target: Outputs) -> None:
    """Raise an error unless a student returns what the teacher returns, in number and shape.

    Raises:
        LoRunError: outputs that differ from the teacher's; a difference of other shapes would compare other images.
    """
    found, expected = ([tuple(tensor.shape) for tensor in outputs.final] for outputs in (own, target))
    if found != expected:
        raise LoRunError(
            f"expected outputs of shape {expected}, as the teacher's, found {found}: train a network that returns what "
            "the teacher returns"
        )


@torch.no_grad()
def psnr_to(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the mean PSNR of ``outputs`` to ``targets`` in dB; the peak is each target's largest absolute value."""
    values = []
    for output, target in zip(outputs, targets):
        crest = target.abs().square().max() / target.abs().square().mean().clamp_min(TINY)
        values.append(10 * torch.log10(crest / relative_error(output, target).clamp_min(TINY)))
    return torch.stack(values).mean()


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
