"""Teacher forcing: train each stage by itself, on the inputs that the teacher gives to its own stage.

A stage that is a little wrong gives the next one an input that no stage has seen; in many networks such errors grow
until nothing can be learnt from the output. Here each stage of the student takes the teacher's input, and is to return
what the teacher's stage returns, with an error that is small relative to what the stage changes. No gradient passes
from one stage to another, so a step keeps one stage in memory, and stages can be spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..network.recording import Recorder, StageCall
from ..util.energy import squared_distance
from .replay import Replay

MAX_NUMBERS = 170_000  # output values that a step trains on


class TeacherForcing:
    """The gradients of the errors of a student's stages, each on the teacher's input to it.

    Args:
        student: the network to train.
        recorder: runs single stages.
        recordings: the teacher's calls.
    """

    def __init__(self, student: nn.Module, recorder: Recorder, recordings: Replay[list[StageCall]]) -> None:
        self.student, self.recorder, self.recordings = student, recorder, recordings

    def for_step(self, step: int) -> list[StageCall]:
        """Return the calls to train on in a step, in the order of the stages: some in turn where outputs are large."""
        calls = self.recordings.for_step(step)
        count = self._count(len(calls), sum(tensor.numel() for call in calls for tensor in call.outputs))
        return [calls[(step * count + i) % len(calls)] for i in range(count)]

    @property
    def takes_turns(self) -> bool:
        """Whether a step trains only some of the stages."""
        return self._count(len(self.recorder.sites), self.recorder.numel) < len(self.recorder.sites)

    @staticmethod
    def _count(stages: int, numel: int) -> int:
        """How many stages a step trains, if all of them pass on so many numbers."""
        return min(stages, max(1, round(stages * MAX_NUMBERS / max(1, numel))))

    def backward(self, calls: Sequence[StageCall], count: int, run_backward: Callable[[Tensor], None]) -> float:
        """Compute the gradients of the sum of the errors of ``calls``, one after another, over ``count``.

        Returns:
            The sum over ``count``.
        """
        total = 0.0
        for call in calls:
            loss = stage_error(self.recorder.run(self.student, call), call) / count
            if loss.requires_grad:
                run_backward(loss)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def error(self, recordings: Sequence[Sequence[StageCall]]) -> float:
        """Return the mean error of the stages over ``recordings``."""
        errors = [stage_error(self.recorder.run(self.student, call), call) for calls in recordings for call in calls]
        return float(torch.stack(errors).mean())


def stage_error(outputs: Sequence[Tensor], call: StageCall) -> Tensor:
    """Return the mean squared error of a stage's outputs to those of ``call``, relative to what the stage changes."""
    errors = [squared_distance(a, b) / change for a, b, change in zip(outputs, call.outputs, call.changes)]
    return torch.stack(errors).mean()
