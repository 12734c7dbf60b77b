"""The training loop: keeps to a duration, shows its progress, keeps the best tensors, can be stopped and resumed."""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import LoRunError
from ..network.batches import IN_A_ROW, Batch, Batches, finite_batches_of, is_finite
from ..network.divergence import FAR
from ..network.recording import StageCall
from ..util.modules import tensors_in_state, write_back
from ..util.progress import progress
from ..util.threads import try_threads_again
from .distill import Distillation, Example
from .duration import Duration, learning_rate_schedule
from .optimised import Optimised
from .processes import broadcast, make_accelerator, mean_over_processes, sum_gradients
from .recompute import explaining
from .replay import STEPS_PER_BATCH, Replay
from .run import EXACT, Phase, Run, end_of, guidance, is_above, peak
from .speed import MARGIN, bfloat16, rounding_psnr, runs_in_bfloat16
from .state_file import read_state, write_state
from .stopping import stopped_by_interrupt
from .supervised import Supervised
from .trained import TrainedTensor

Drawn = Example | Sequence[StageCall]  # what a step trains on

CHECKS = 25  # of the loss on held-out batches, in a run
CHECKING = 0.05  # the fraction of the time that checks may take
SPIKE = 30.0  # a step is left out if its loss is more than this many times the loss of the steps before
WORSE = 4.0  # training returns to the best weights if the loss on held-out batches is this many times the best,
STUCK = 3, 6, 9  # and, in a phase with patience, after this many checks in a row without an improvement
FORWARDS_OF_FIRST_STEP = 6  # for the test whether the teacher is deterministic, its output, the step and the check
TOO_LATE = 0.5  # the fraction of the duration after which other precisions are not tried out
LEAST_GAIN = 0.01  # of the loss between two checks: less than this does not count while single stages train


class Trainer:
    """Trains some tensors of a network in place, and leaves the best of them that it saw.

    Args:
        objective: the loss to minimise.
        trained: the tensors to train, in an order that is the same in each run.
        calibration: the batches to train on.
        duration: how long to train.
        seed: of all random numbers. On a CPU, the same seed and number of steps give the same tensors bit for bit.
        resume_from: the state file, which keeps the state of the run, also that of its end. If it exists, the run
            resumes from it; the batches that were used up are drawn again.
        run_id: identifies the run, so that it does not resume from the state file of another one.
        phases: what to train on, one after another; each begins with the best tensors so far.
        started: when the duration began, by ``time.monotonic()``.
        held_out: finite batches on which the tensors are judged; by default the first ones of ``calibration``.
        restored: the tensors that resuming restores beside the trained ones; by default all others of the student.

    Attributes:
        seconds_per_check: how long the last check of the held-out batches took, a forward of the student on each.

    Raises:
        LoRunError: a tensor to train has 16 bits only.
    """

    def __init__(
        self,
        objective: Distillation | Supervised,
        trained: Sequence[TrainedTensor],
        calibration: Batches,
        duration: Duration,
        *,
        seed: int,
        resume_from: Path | None,
        run_id: str,
        phases: Sequence[Phase],
        started: float,
        held_out: Sequence[Batch] = (),
        restored: Sequence[Tensor] | None = None,
    ) -> None:
        self.restored = list(tensors_in_state(objective.student).values()) if restored is None else restored
        self.held_out, self.examples, self.phases = list(held_out), list[Example](), list(phases)
        self.objective, self.calibration = objective, calibration
        self.duration, self.seed, self.resume_from = duration, seed, resume_from
        self.accelerator = make_accelerator()
        shapes = [tuple(item.parameter.shape) for item in trained]
        processes = self.accelerator.num_processes
        self.run_id = f"{run_id}, seed {seed}, {processes} processes, {len(phases)} phases, {shapes}"
        self.optimised = Optimised(trained, self.accelerator)
        self.loss_of: Any = None  # the objective, distributed over the processes
        self.run, self.started = Run(), started
        self.best = self.checked = self.optimised.values()  # the best tensors, and those of the last check
        self._rounding, self._judged = math.inf, False
        self.seconds_per_check, self._checked = 0.0, -math.inf
        self._shown: dict[str, str] = {}

    def train(self, stop: threading.Event) -> bool:
        """Train for the duration, or until ``stop`` is set, and leave the best tensors in place.

        Returns:
            Whether it trained to the end.

        Raises:
            LoRunError: no batch of the first ones is finite, the batches end, or the loss stays NaN or Inf. The best
                tensors are left in place then too.
        """
        try:
            self._loop(stop)
        except KeyboardInterrupt:  # raised while a batch was made, or where no signal handler can be set
            stop.set()
        finally:
            self.optimised.put(self.best)
            self.optimised.clear_gradients()
        return not stop.is_set()

    def judge(self) -> None:
        """Judge the tensors as they are, before training begins, and keep a copy if they are the best so far."""
        self._hold_out()
        self._check(None)
        if not self._judged:
            self.run.first = self.run.best
        self._judged, self.run.worse = True, 0

    def _hold_out(self) -> None:
        self.held_out = self.held_out or finite_batches_of(self.calibration)
        if not self.examples:
            judged = self.held_out[: self.run.judged]
            self.examples = [self.objective.example(batch, self.seed + i) for i, batch in enumerate(judged)]

    @property
    def improved(self) -> bool:
        """Whether the tensors are better on the held-out batches than before training, or were exact already."""
        return self.run.best < self.run.first or abs(self.run.first) < EXACT

    def _loop(self, stop: threading.Event) -> None:
        if self.resume_from is not None and self.resume_from.exists():
            self._resume(self.resume_from)
        if self._stopped(stop):
            return
        run = self.run
        run.seconds = run.seconds or broadcast(time.monotonic() - self.started)
        if self._done() >= 1:
            return self.calibration.skip_to(run.seen)
        started = time.monotonic() - run.seconds
        self._hold_out()
        label, unit = self.phases[run.phase].label, "step" if self.duration.steps else "s"
        total, initial = self.duration.total, self.duration.position(run.seconds, run.step)
        hidden = not self.accelerator.is_main_process
        with progress(None, label, unit, total=total, initial=initial, disable=hidden) as bar:
            if not run.step and self._done() < TOO_LATE:
                run.bfloat16 = runs_in_bfloat16(self.objective, self.held_out[0], self.seed)
            if run.bfloat16:
                self._rounding = rounding_psnr(self.objective, self.examples[0])
            if not run.step:
                self.optimised.set_rates()
                if not self._judged or run.bfloat16:  # a check ends bfloat16 where its rounding would hide the rest
                    self.judge()
                run.seconds = run.phase_began = broadcast(time.monotonic() - started)
            for number in range(run.phase, len(self.phases)):
                if number != run.phase:
                    self._begin(number, started)
                if not self._train(self.phases[number], stop, started, bar):
                    self._save()
                    return

    def _begin(self, number: int, started: float) -> None:
        """Begin a phase with the best tensors so far."""
        run, before = self.run, self.phases[self.run.phase].forcing
        if before is None or run.best < max(run.first, FAR):  # otherwise the stages have learnt more than it shows
            self.optimised.put(self.best)
        if before is not None:
            before.recordings.clear()
        run.begin(number, broadcast(time.monotonic() - started))
        self.optimised.restart()

    def _train(self, phase: Phase, stop: threading.Event, started: float, bar: tqdm) -> bool:
        """Train in one phase, from where it stands; return False if it was stopped."""
        run, forcing = self.run, phase.forcing
        if not run.phase_step and self._done() + self._first_step() >= end_of(phase, run, self.duration):
            return not self._stopped(stop)
        bar.set_description(phase.label, refresh=False)
        replay: Replay[Any] = self._replay() if forcing is None else forcing.recordings
        for_step: Callable[[int], Drawn] = replay.for_step if forcing is None else forcing.for_step
        replay.left_out = run.left_out
        while (done := self._done()) < end_of(phase, run, self.duration) and not self._is_over(phase):
            if self._stopped(stop):
                return False
            drawn: Drawn | None = None
            with stopped_by_interrupt(stop):
                drawn = for_step(run.phase_step)
            if self._stopped(stop) or drawn is None:
                return False
            began = run.began(self.duration)
            fraction = min(1.0, (done - began) / max(end_of(phase, run, self.duration) - began, 1e-9))
            loss = math.nan if replay.last in run.left_out else self._step(phase, drawn, fraction)
            if not math.isfinite(loss):
                run.left_out.append(replay.last)
            run.step, run.phase_step = run.step + 1, run.phase_step + 1
            run.seconds = broadcast(time.monotonic() - started)
            bar.update(self.duration.position(run.seconds, run.step) - bar.n)
            try_threads_again()
            self._show(bar, step=str(run.step), loss=f"{loss:.3g}", threads=str(torch.get_num_threads()))
            if forcing is not None:
                run.drawn = max(run.drawn, self.calibration.drawn)
            if self._is_due(done, phase):
                self._check(bar, phase)
                self._save()
        if run.rollbacks > IN_A_ROW:
            warnings.warn(f"{phase.label}: it ended early, as its steps kept making the loss much larger", stacklevel=2)
        return not self._stopped(stop)

    def _replay(self) -> Replay[Example]:
        """What this process trains on end to end."""
        run, objective = self.run, self.objective
        if not math.isfinite(run.best):
            raise LoRunError(
                "the loss is NaN or Inf before training: check what the networks return for the first batches of "
                "calibration"
            )
        self.loss_of = self.loss_of or self.accelerator.prepare(objective)
        if not run.phase_step:
            run.drawn = max(run.drawn, self.calibration.drawn)
        self.calibration.skip_to(run.drawn)
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = itertools.islice(self.calibration, index, None, processes)
        often = STEPS_PER_BATCH if broadcast(objective.is_reusable(self.examples[0])) else 1
        # All processes choose alike; only the random numbers within a batch differ.
        return Replay(batches, lambda batch, seed: objective.example(batch, seed + index), self.seed, processes, often)

    def _done(self) -> float:
        """The fraction of the duration that is over."""
        return self.duration.fraction_done(self.run.seconds, self.run.step)

    def _first_step(self) -> float:
        """About the fraction of the minutes that the first step of a phase takes, with the check after it."""
        examples = math.ceil(len(self.examples) / self.accelerator.num_processes)  # of one process, in a check
        seconds = FORWARDS_OF_FIRST_STEP * self.seconds_per_check / max(1, examples)
        return broadcast(self.duration.fraction_done(seconds, 0))

    def _is_over(self, phase: Phase) -> bool:
        """Whether a phase ends early: it has come far enough, improves nothing, or keeps returning to the best."""
        impatient = phase.patience is not None and self.run.worse >= phase.patience
        return impatient or self.run.rollbacks > IN_A_ROW or self.run.psnr >= phase.until_psnr

    def _is_due(self, done: float, phase: Phase) -> bool:
        """Whether to check now: 25 times in a run and at the end of each phase, but rarely enough on a clock."""
        if (after := self._done()) >= end_of(phase, self.run, self.duration):
            return True
        if self.duration.minutes and self.seconds_per_check > CHECKING * (time.monotonic() - self._checked):
            return broadcast(False)
        return broadcast(math.floor(CHECKS * after) > math.floor(CHECKS * done))

    # --- one step --------------------------------------------------------------------------------

    def _step(self, phase: Phase, drawn: Drawn, done: float) -> float:
        run = self.run
        value = self._gradients(phase, drawn, done)
        if not math.isfinite(value):
            usable = phase.forcing is not None or is_finite(cast(Example, drawn).batch)
            if math.isfinite(mean_over_processes(self.accelerator, 0.0 if usable else math.nan)):
                self._roll_back(f"the loss is {value} at step {run.step}", phase)
            else:
                self._skip(f"NaN or Inf in the batch of step {run.step}")
            return value
        run.skipped = 0
        if run.recent_loss is not None and is_above(value, run.recent_loss, SPIKE):
            run.spikes += 1
            self.optimised.clear_gradients()
            if run.spikes > 1:  # not the batch, but the weights
                self._return_to_best(phase)
            return value
        run.spikes = 0
        run.recent_loss = value if run.recent_loss is None else max(value, 0.95 * run.recent_loss)
        if not self.optimised.gradients_are_finite():
            self._roll_back(f"a gradient is NaN or Inf at step {run.step}", phase)
            return value
        self.optimised.step(peak(phase, run, self.duration) * run.rate_factor * learning_rate_schedule(done))
        return value

    def _gradients(self, phase: Phase, drawn: Drawn, done: float) -> float:
        """Compute the gradients of a step; return its loss, NaN or Inf where any process has that."""
        run, index, processes = self.run, self.accelerator.process_index, self.accelerator.num_processes
        if phase.forcing is not None:
            with bfloat16(run.bfloat16), self.accelerator.autocast():
                own = cast(Sequence[StageCall], drawn)[(index + run.phase_step) % processes :: processes]
                value = phase.forcing.backward(own, len(drawn), self.accelerator.backward)
            if processes > 1:
                sum_gradients(self.optimised.parameters, self.accelerator)
            return processes * mean_over_processes(self.accelerator, value)
        if isinstance(self.objective, Distillation):
            self.objective.guidance = guidance(done)
        with bfloat16(run.bfloat16), explaining(bool(self.objective.recomputed)):
            loss = self.loss_of(lambda: drawn)[0]
        value = mean_over_processes(self.accelerator, float(loss.detach()))
        if math.isfinite(value):
            with explaining(bool(self.objective.recomputed)):
                self.accelerator.backward(loss)
        return value

    def _skip(self, problem: str) -> None:
        self.run.skipped += 1
        if self.run.skipped > IN_A_ROW:
            raise LoRunError(f"{problem} and in the {IN_A_ROW} before it: remove such batches from calibration")
        warnings.warn(f"{problem}: the batch is skipped", stacklevel=2)

    def _roll_back(self, problem: str, phase: Phase) -> None:
        self._return_to_best(phase)
        if self.run.rollbacks > IN_A_ROW:
            raise LoRunError(
                f"{problem}, after {IN_A_ROW} returns to the best weights with ever smaller steps: check the "
                "calibration for NaN and the network for overflow"
            )
        warnings.warn(f"{problem}: going on from the best weights so far, with half the learning rate", stacklevel=2)

    def _return_to_best(self, phase: Phase) -> None:
        """Return to the best tensors (while single stages train: to those of the last check); halve the rate."""
        self.run.rollbacks += 1
        self.run.rate_factor /= 2
        self.run.recent_loss = None
        self.optimised.put(self.best if phase.forcing is None else self.checked)
        self.optimised.restart()

    def _check(self, bar: tqdm | None, phase: Phase | None = None) -> None:
        """Keep a copy of the tensors if they are the best so far on the held-out batches, which the processes share."""
        started, processes = time.monotonic(), self.accelerator.num_processes
        with torch.no_grad(), self.accelerator.autocast():
            own = self.examples[self.accelerator.process_index :: processes]
            scores = [self.objective(lambda example=example: example)[1:] for example in own]
        sums = [sum(float(score[part]) for score in scores) * processes / len(self.examples) for part in (0, 1)]
        value, self.run.psnr = (mean_over_processes(self.accelerator, part) for part in sums)
        self._checked = time.monotonic()
        self.seconds_per_check = self._checked - started
        if not math.isfinite(value):
            if phase is not None and phase.forcing is None:
                self._roll_back(f"the loss on held-out batches is {value} at step {self.run.step}", phase)
            return
        if math.isnan(self.run.psnr):  # without a teacher, rounding can't be told from the error that is left
            self._show(bar, held_out=f"{value:.3g}")
        else:
            self.run.bfloat16 = self.run.bfloat16 and self.run.psnr < self._rounding - MARGIN
            self._show(bar, psnr=f"{self.run.psnr:.2f}", precision="bfloat16" if self.run.bfloat16 else "float32")
        self.run.worse += 1
        least = LEAST_GAIN * abs(self.run.best) if phase is not None and phase.forcing else 0.0
        if not math.isfinite(self.run.best) or value < self.run.best - least:
            self.run.worse = 0
        if phase is not None and phase.forcing is None:
            stuck = phase.patience is not None and self.run.worse in STUCK
            if stuck or is_above(value, self.run.best, WORSE):
                return self._return_to_best(phase)
        self.run.rollbacks, self.checked = 0, self.optimised.values()
        if value <= self.run.best:
            self.run.best, self.best = value, self.checked

    def _stopped(self, stop: threading.Event) -> bool:
        """Whether to stop; the main process decides, so that no process waits for another."""
        if stopped := broadcast(stop.is_set()):
            stop.set()
        return stopped

    # --- resuming --------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.resume_from is None or not self.accelerator.is_main_process or not self.run.step:
            return
        self.run.seen = self.calibration.drawn
        state = {
            "run": asdict(self.run),
            "best": self.best,
            "checked": self.checked,
            "others": [tensor.clone() for tensor in self._restored_tensors()],
            "weights": self.optimised.state(),
        }
        write_state(self.resume_from, self.run_id, state)

    def _restored_tensors(self) -> list[Tensor]:
        """What the start of a run may change but no step does: buffers, and tensors that the authors don't train."""
        trained = {parameter.data_ptr() for parameter in self.optimised.parameters}
        return [tensor for tensor in self.restored if tensor.data_ptr() not in trained]

    def _resume(self, path: Path) -> None:
        state = read_state(path, self.run_id)
        self.run, self.best, self.checked = Run(**state["run"]), state["best"], state["checked"]
        self.optimised.restore(state["weights"])
        write_back(self._restored_tensors(), state["others"])
        if self._done() >= 1:
            warnings.warn(f"the run in {path} was over already: remove the file to train anew", stacklevel=2)

    def _show(self, bar: tqdm | None, **values: str) -> None:
        self._shown |= values
        if bar is not None:
            bar.set_postfix(self._shown, refresh=False)
