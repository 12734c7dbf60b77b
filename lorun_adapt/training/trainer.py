"""The training loop: keeps to a duration, shows its progress, keeps the best tensors, can be stopped and resumed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LoRunError
from ..network.batches import Batch, Batches, finite_batches_of, is_finite
from ..network.recording import StageCall
from ..util.nested import to_device
from ..util.progress import progress
from .distill import Distillation
from .duration import Duration, learning_rate_schedule
from .processes import broadcast, make_accelerator
from .recompute import explaining
from .speed import MARGIN, bfloat16, rounding_psnr, runs_in_bfloat16
from .stagewise import TeacherForcing
from .state_file import read_state, write_state
from .supervised import Supervised
from .trained import TrainedTensor

T = TypeVar("T")

CHECKS = 25  # of the loss on held-out batches, in a run
CHECKING = 0.05  # the fraction of the time that checks may take
IN_A_ROW = 5  # rollbacks, or skipped batches, that are tolerated one after another
SPIKE = 30.0  # times the usual loss of a step, or
LEAST_PEAK = 0.25  # of the learning rate of a short phase
WORSE = 4.0  # times the best loss on held-out batches: from here on, training returns to the best weights
MIN_RMS = 0.01  # a tensor's learning rate is relative to its values, or to this where they are smaller, as at zero
WORTH = 0.01  # a gain below this fraction of the loss does not pay for training single stages
EXACT = 1e-9  # a held-out loss below which there is nothing to recover
MAX_SIDE = 512  # of a tensor that SOAP preconditions; it skips longer dimensions


@dataclass(frozen=True)
class Phase:
    """A part of a run, with a learning rate that rises and falls within it.

    Attributes:
        label: text of the progress bar.
        until: the fraction of the duration at which it ends.
        patience: the number of checks in a row without a better result after which it ends early.
        forcing: what to minimise instead of the trainer's objective: the errors of single stages.
        steps: with fewer steps than these, the highest learning rate is lower, by the square root of their share.
    """

    label: str
    until: float = 1.0
    patience: int | None = None
    forcing: TeacherForcing | None = None
    steps: int = 0


@dataclass
class Run:
    """The progress of a run, as the state file keeps it."""

    step: int = 0
    seconds: float = 0.0
    phase: int = 0
    phase_step: int = 0  # steps in this phase
    began: float = 0.0  # the fraction of the duration at which the phase began
    phase_began: float = 0.0  # at this many seconds
    drawn: int = 0  # batches that were drawn before the phase began
    usual: float | None = None  # the mean loss of the last steps
    damping: float = 1.0  # of the learning rate: halved at each rollback
    rollbacks: int = 0  # since the last good check
    skipped: int = 0  # batches with NaN or Inf, one after another
    first: float = math.inf  # loss on the held-out batches before training
    best: float = math.inf  # the lowest so far
    worse: int = 0  # checks since the best one
    bfloat16: bool = False


class Trainer:
    """Trains some tensors of a network in place, and leaves the best of them that it saw.

    Args:
        objective: the loss to minimise.
        trained: the tensors to train, in an order that is the same in each run.
        calibration: the batches to train on.
        duration: how long to train.
        seed: of all random numbers. On a CPU, the same seed and number of steps give the same tensors to the bit.
        resume_from: the state file, which keeps the state of the run while it lasts. If it exists, the run resumes
            from it; the batches that were used up are drawn again, without computing anything.
        run_id: identifies the run, so that it does not resume from the state file of another one.
        phases: what to train on, one after another; each begins with the best tensors so far.
        started: when the duration began, by ``time.monotonic()``.
        held_out: finite batches on which the tensors are judged; by default the first ones of ``calibration``.
        restored: the tensors that resuming restores beside the trained ones; by default all others of the student.

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
        self.restored = restored
        self.held_out, self.phases = list(held_out), list(phases)
        self.objective, self.trained, self.calibration = objective, trained, calibration
        self.duration, self.seed, self.resume_from = duration, seed, resume_from
        self.accelerator = make_accelerator()
        shapes = [tuple(item.parameter.shape) for item in trained]
        self.run_id = f"{run_id}, seed {seed}, {self.accelerator.num_processes} processes, {shapes}"
        self._clear_gradients()
        for item in trained:
            if item.parameter.dtype in (torch.float16, torch.bfloat16):
                raise LoRunError(
                    f"expected tensors of 32 bits or more to train, found {item.parameter.dtype}: convert in float32, "
                    "and save with save_pretrained(path, dtype=torch.float16) afterwards"
                )
        self.loss_of: Any = None  # the objective, distributed over the processes
        # SOAP does not support complex tensors: it trains views of them as pairs of real numbers.
        self.tensors = [_real(item.parameter) for item in trained]
        self.rates = [item.rate * max(_rms(item.parameter), MIN_RMS) for item in trained]
        self.optimizer, self.prepared = self._new_optimizer()
        self.run, self.started = Run(), started
        self.best = self._values()
        self._rounding = math.inf
        self._seconds_per_check = 0.0
        self._checked = -math.inf
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
            self._put(self.best)
            self._clear_gradients()
        if stop.is_set():
            return False
        if self.resume_from is not None and self.accelerator.is_main_process:
            self.resume_from.unlink(missing_ok=True)
        return True

    def judge(self) -> None:
        """Judge the tensors as they are, before training begins, and keep a copy if they are the best so far."""
        self._hold_out()
        self._check(None)
        if not math.isfinite(self.run.first):
            self.run.first = self.run.best

    def _hold_out(self) -> None:
        self.held_out = self.held_out or finite_batches_of(self.calibration)

    @property
    def improved(self) -> bool:
        """Whether the tensors are better on the held-out batches than before training, or were exact already."""
        return self.run.best < self.run.first or self.run.first < EXACT

    def _loop(self, stop: threading.Event) -> None:
        if self._stopped(stop):
            return
        if self.resume_from is not None and self.resume_from.exists():
            self._resume(self.resume_from)
        run = self.run
        self._hold_out()
        run.seconds = run.seconds or broadcast(time.monotonic() - self.started)
        started = time.monotonic() - run.seconds
        with self._bar() as bar:
            if not run.step:
                run.bfloat16 = runs_in_bfloat16(self.objective, self.held_out[0], self.seed)
            if run.bfloat16:
                self._rounding = rounding_psnr(self.objective, self.held_out[0], self.seed)
            if not run.step:
                self.judge()
            for number in range(run.phase, len(self.phases)):
                if number != run.phase:
                    self._begin(number, started)
                if not self._train(self.phases[number], stop, started, bar):
                    self._save()
                    return

    def _begin(self, number: int, started: float) -> None:
        """Begin a phase with the best tensors so far."""
        run = self.run
        if math.isfinite(run.best):
            self._put(self.best)
        run.seconds = broadcast(time.monotonic() - started)
        run.phase, run.phase_step, run.began = number, 0, self.duration.fraction_done(run.seconds, run.step)
        run.phase_began = run.seconds
        run.drawn, run.usual, run.damping, run.rollbacks, run.worse = self.calibration.drawn, None, 1.0, 0, 0
        self.optimizer, self.prepared = self._new_optimizer()
        self._clear_gradients()

    def _train(self, phase: Phase, stop: threading.Event, started: float, bar: tqdm) -> bool:
        """Train in one phase, from where it stands; return False if it was stopped."""
        run, processes = self.run, self.accelerator.num_processes
        bar.set_description(phase.label, refresh=False)
        forcing = phase.forcing
        if forcing is None:
            if not math.isfinite(run.best):
                raise LoRunError(
                    "the loss is NaN or Inf before training: check what the networks return for the first batches of "
                    "calibration"
                )
            self.loss_of = self.loss_of or self.accelerator.prepare(self.objective)
            if not run.phase_step:
                run.drawn = self.calibration.drawn
            self.calibration.skip_to(run.drawn)
            used = run.phase_step * processes + self.accelerator.process_index
            batches = itertools.islice(self.calibration, used, None, processes)
        while (done := self.duration.fraction_done(run.seconds, run.step)) < phase.until and not self._is_over(phase):
            if self._stopped(stop):
                return False
            draw = (
                functools.partial(next, batches) if forcing is None else functools.partial(forcing.draw, run.phase_step)
            )
            drawn = self._drawn(draw, stop)
            if self._stopped(stop) or drawn is None:
                return False
            fraction = (done - run.began) / max(phase.until - run.began, 1e-9)
            loss = self._step(phase, drawn, fraction)
            run.step, run.phase_step = run.step + 1, run.phase_step + 1
            run.seconds = broadcast(time.monotonic() - started)
            bar.update(_bar_position(self.duration, run) - bar.n)
            self._show(bar, step=str(run.step), loss=f"{loss:.3g}")
            after = self.duration.fraction_done(run.seconds, run.step)
            if self._is_due(done, after, phase):
                self._check(bar, phase)
                self._save()
        return not self._stopped(stop)

    def _is_over(self, phase: Phase) -> bool:
        """Whether a phase has stopped paying."""
        impatient = phase.patience is not None and self.run.worse >= phase.patience
        return impatient or self.run.rollbacks > IN_A_ROW

    def _is_due(self, done: float, after: float, phase: Phase) -> bool:
        """Whether to check now: 25 times in a run and at the end of each phase, but rarely enough on a clock."""
        if after >= phase.until:
            return True
        if self.duration.minutes and self._seconds_per_check > CHECKING * (time.monotonic() - self._checked):
            return broadcast(False)
        return broadcast(math.floor(CHECKS * after) > math.floor(CHECKS * done))

    # --- one step --------------------------------------------------------------------------------

    def _step(self, phase: Phase, drawn: Batch | Sequence[StageCall], done: float) -> float:
        run = self.run
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * self._peak(phase) * run.damping * learning_rate_schedule(done)
        value = self._gradients(phase, drawn)
        if not math.isfinite(value):
            usable = phase.forcing is not None or is_finite(cast(Batch, drawn))
            if math.isfinite(self._mean_over_processes(0.0 if usable else math.nan)):
                self._roll_back(f"the loss is {value} at step {run.step}")
            else:
                self._skip(f"NaN or Inf in the batch of step {run.step}")
            return value
        run.skipped = 0
        if run.usual is not None and value > SPIKE * run.usual:
            self._clear_gradients()
            self._return_to_best()
            return value
        run.usual = value if run.usual is None else 0.9 * run.usual + 0.1 * value
        if self.accelerator.scaler is None and not self._gradients_are_finite():
            self._roll_back(f"a gradient is NaN or Inf at step {run.step}")
            return value
        for item, tensor in zip(self.trained, self.tensors):
            if tensor is not item.parameter:
                gradient, item.parameter.grad = item.parameter.grad, None
                tensor.grad = None if gradient is None else torch.view_as_real(gradient)
        self.prepared.step()
        self.optimizer.zero_grad()
        return value

    def _peak(self, phase: Phase) -> float:
        """The highest learning rate of a phase, relative to that of the tensors: lower where the phase is short."""
        run = self.run
        if not phase.steps:
            return 1.0
        if self.duration.steps:
            expected = (phase.until - run.began) * self.duration.steps
        elif run.phase_step < 2:  # the first step may take longer than others
            return LEAST_PEAK
        else:
            seconds = run.seconds - run.phase_began
            expected = (phase.until - run.began) * 60 * (self.duration.minutes or 0) * run.phase_step / seconds
        return min(1.0, max(LEAST_PEAK, math.sqrt(expected / phase.steps)))

    def _gradients(self, phase: Phase, drawn: Batch | Sequence[StageCall]) -> float:
        """Compute the gradients of a step; return its loss, NaN or Inf where any process has that."""
        run, index, processes = self.run, self.accelerator.process_index, self.accelerator.num_processes
        if phase.forcing is not None:
            with bfloat16(run.bfloat16):
                own = cast(Sequence[StageCall], drawn)[(index + run.phase_step) % processes :: processes]
                value = phase.forcing.backward(own, len(drawn), self.accelerator.backward)
            if processes > 1:
                self._sum_gradients()
            return processes * self._mean_over_processes(value)
        seed = self.seed + run.step * processes + index
        with bfloat16(run.bfloat16):
            loss = self.loss_of(lambda: drawn, seed)[0]
        value = self._mean_over_processes(float(loss.detach()))
        if math.isfinite(value):
            with explaining() if self.objective.recomputed else contextlib.nullcontext():
                self.accelerator.backward(loss)
        return value

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes, where a process has those of some stages only."""
        gradients = [
            torch.zeros_like(item.parameter) if item.parameter.grad is None else item.parameter.grad
            for item in self.trained
        ]
        flat = torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in gradients])
        parts = iter(self.accelerator.reduce(flat, "sum").split([(1 + g.is_complex()) * g.numel() for g in gradients]))
        for item, gradient in zip(self.trained, gradients):
            part = next(parts)
            part = torch.view_as_complex(part.view(-1, 2)) if gradient.is_complex() else part
            item.parameter.grad = part.view(gradient.shape).clone()

    def _skip(self, problem: str) -> None:
        self.run.skipped += 1
        if self.run.skipped > IN_A_ROW:
            raise LoRunError(f"{problem} and in the {IN_A_ROW} before it: remove such batches from calibration")
        warnings.warn(f"{problem}: the batch is skipped", stacklevel=2)

    def _roll_back(self, problem: str) -> None:
        run = self.run
        run.rollbacks += 1
        if run.rollbacks > IN_A_ROW:
            raise LoRunError(
                f"{problem}, after {IN_A_ROW} returns to the best weights with ever smaller steps: check the "
                "calibration for NaN and the network for overflow"
            )
        self._return_to_best()
        run.rollbacks -= 1
        warnings.warn(f"{problem}: going on from the best weights so far, with half the learning rate", stacklevel=2)

    def _return_to_best(self) -> None:
        """Return to the best tensors, and halve the learning rate."""
        self.run.rollbacks += 1
        self.run.damping /= 2
        self.run.usual = None
        if math.isfinite(self.run.best):
            self._put(self.best)
        self.optimizer, self.prepared = self._new_optimizer()
        self._clear_gradients()

    def _new_optimizer(self) -> tuple[SOAP, Any]:
        groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(self.tensors, self.rates)]
        optimizer = SOAP(groups, weight_decay=0.0, max_precondition_dim=MAX_SIDE)
        return optimizer, self.accelerator.prepare(optimizer)

    # --- checking on held-out batches ------------------------------------------------------------

    def _check(self, bar: tqdm | None, phase: Phase | None = None) -> None:
        """Keep a copy of the tensors if they are the best so far on the held-out batches."""
        started = time.monotonic()
        with torch.no_grad():
            scores = [self.objective.score(batch, self.seed + i) for i, batch in enumerate(self.held_out)]
        value, psnr = (self._mean_over_processes(sum(map(float, column)) / len(scores)) for column in zip(*scores))
        self._checked = time.monotonic()
        self._seconds_per_check = self._checked - started
        if not math.isfinite(value):
            if self.run.step and (phase is None or phase.forcing is None):
                self._roll_back(f"the loss on held-out batches is {value} at step {self.run.step}")
            return
        if math.isnan(psnr):  # without a teacher, rounding can't be told from the error that is left
            self._show(bar, held_out=f"{value:.3g}")
        else:
            self.run.bfloat16 = self.run.bfloat16 and psnr < self._rounding - MARGIN
            self._show(bar, psnr=f"{psnr:.2f}")
        self.run.worse += 1
        if value < self.run.best * (1 - WORTH if phase is not None and phase.forcing else 1):
            self.run.worse = 0
        if value <= self.run.best:
            self.run.best, self.best = value, self._values()
        if value > WORSE * self.run.best and phase is not None and phase.forcing is None:
            self._return_to_best()
        else:
            self.run.rollbacks = 0

    def _clear_gradients(self) -> None:
        for item in self.trained:
            item.parameter.grad = None

    def _gradients_are_finite(self) -> bool:
        norms = [item.parameter.grad.norm() for item in self.trained if item.parameter.grad is not None]
        return not norms or bool(torch.isfinite(torch.stack(norms)).all())

    def _values(self) -> list[Tensor]:
        return [item.parameter.detach().clone() for item in self.trained]

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for item, value in zip(self.trained, values):
                item.parameter.copy_(value)

    # --- stopping --------------------------------------------------------------------------------

    def _stopped(self, stop: threading.Event) -> bool:
        """Whether to stop; the main process decides, so that no process waits for another."""
        if broadcast(stop.is_set()):
            stop.set()
            return True
        return False

    def _drawn(self, draw: Callable[[], T], stop: threading.Event) -> T | None:
        """What ``draw`` returns, or None if Ctrl-C interrupted it."""
        try:
            return draw()
        except KeyboardInterrupt:
            stop.set()
        except Exception:  # Ctrl-C also ends the workers of a loader, which then raises
            if not stop.is_set():
                raise
        return None

    # --- several processes -----------------------------------------------------------------------

    def _mean_over_processes(self, value: float) -> float:
        """The mean; NaN or Inf where any process has that."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean"))

    # --- resuming --------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.resume_from is None or not self.accelerator.is_main_process or not self.run.step:
            return
        state = {
            "run": asdict(self.run),
            "values": self._values(),
            "best": self.best,
            "rates": self.rates,
            "others": [tensor.clone() for tensor in self._restored_tensors()],
            "optimizer": [self.optimizer.state.get(tensor, {}) for tensor in self.tensors],
            "counts": [group.get("step", 0) for group in self.optimizer.param_groups],
        }
        write_state(self.resume_from, self.run_id, state)

    def _restored_tensors(self) -> list[Tensor]:
        """What the start of a run may change but no step does: buffers, and tensors that the authors don't train."""
        trained = {item.parameter.data_ptr() for item in self.trained}
        tensors = self.objective.student.state_dict().values() if self.restored is None else self.restored
        return [tensor for tensor in tensors if tensor.data_ptr() not in trained]

    def _resume(self, path: Path) -> None:
        state = read_state(path, self.run_id)
        self.run, self.best, self.rates = Run(**state["run"]), state["best"], state["rates"]
        self._put(state["values"])
        for tensor, value in zip(self._restored_tensors(), state["others"]):
            tensor.copy_(value)
        for tensor, group, moments, count in zip(
            self.tensors, self.optimizer.param_groups, state["optimizer"], state["counts"]
        ):
            group["step"] = count
            if moments:
                self.optimizer.state[tensor].update(to_device(moments, tensor.device))

    # --- the progress bar ------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        return progress(
            None,
            self.phases[self.run.phase].label,
            "step" if self.duration.steps else "s",
            total=_bar_position(self.duration, None),
            initial=_bar_position(self.duration, self.run),
            disable=not self.accelerator.is_main_process,
        )

    def _show(self, bar: tqdm | None, **values: str) -> None:
        self._shown |= values
        if bar is not None:
            bar.set_postfix(self._shown, refresh=False)


def _bar_position(duration: Duration, run: Run | None) -> int:
    """How far the progress bar is, in seconds or steps; without a run, where it ends."""
    if duration.steps:
        return run.step if run else duration.steps
    return round(run.seconds if run else 60 * (duration.minutes or 0))


def _real(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.view_as_real(parameter.detach())) if parameter.is_complex() else parameter


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().abs().square().mean().sqrt())


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the current step can end; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
