"""Teacher forcing: train each stage by itself, on the inputs that the teacher gives to its own stage.

A stage that is a little wrong gives the next one an input that no stage has seen; in many networks such errors grow
until nothing can be learnt from the output. Here each stage of the student takes the teacher's input, and is to return
what the teacher's stage returns, with an error that is small relative to what the stage changes. No gradient passes
from one stage to another, so a step keeps one stage in memory, and stages can be spread over processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..network.batches import Batch
from ..network.recording import Recorder, StageCall, num_bytes
from ..util.energy import squared_distance

STEPS_PER_BATCH = 3  # times the processes, as each one records the teacher, which takes a third of a step's time
MAX_NUMBERS = 170_000  # output values that a step trains on
MAX_BYTES = 1 << 30  # of recorded calls


class Recordings:
    """Records the teacher's calls on batches, and picks one recorded batch for each step.

    Every third step has a new batch, until the recordings that are kept take 1 GiB; with several processes, which share
    the work of a step but not that of recording, so many times more seldom.

    Args:
        recorder: records the teacher.
        batches: the batches; they are drawn when they are needed.
        seed: of the choice, and of the teacher's random numbers.
        processes: how many processes share a step.
    """

    def __init__(self, recorder: Recorder, batches: Iterator[Batch], seed: int, processes: int = 1) -> None:
        self._steps_per_batch = STEPS_PER_BATCH * processes
        self._recorder, self._batches, self._seed = recorder, batches, seed
        self._drawn: list[Batch] = []
        self._calls: dict[int, list[StageCall]] = {}
        self._most = 1  # recordings that there is room for, as the first one shows

    def __getitem__(self, index: int) -> list[StageCall]:
        """Return the calls on the batch with this number, counted from 0."""
        while len(self._drawn) <= index:
            self._drawn.append(next(self._batches))
        if index in self._calls:
            return self._calls[index]
        calls = self._recorder.record(self._drawn[index], self._seed + index)
        if index == 0:
            self._most = max(1, MAX_BYTES // max(1, num_bytes(calls)))
        if index < self._most:
            self._calls[index] = calls
        return calls

    def clear(self) -> None:
        """Forget all batches and calls."""
        self._drawn.clear()
        self._calls.clear()

    def for_step(self, step: int) -> list[StageCall]:
        """Return the calls to train on in a step; the same ones for the same step."""
        self[0]  # how many there is room for
        newest = step // self._steps_per_batch
        if step % self._steps_per_batch == 0 and newest < self._most:
            return self[newest]
        return self[random.Random(self._seed + step).randrange(min(newest + 1, self._most))]


class TeacherForcing:
    """The gradients of the errors of a student's stages, each on the teacher's input to it.

    Args:
        student: the network to train.
        recorder: runs single stages.
        recordings: the teacher's calls.
    """

    def __init__(self, student: nn.Module, recorder: Recorder, recordings: Recordings) -> None:
        self.student, self.recorder, self.recordings = student, recorder, recordings

    def draw(self, step: int) -> list[StageCall]:
        """Return the calls to train on in a step, in the order of the stages: some in turn where outputs are large."""
        calls = self.recordings.for_step(step)
        size = sum(tensor.numel() for call in calls for tensor in call.outputs)
        count = min(len(calls), max(1, round(len(calls) * MAX_NUMBERS / max(1, size))))
        return [calls[(step * count + i) % len(calls)] for i in range(count)]

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
