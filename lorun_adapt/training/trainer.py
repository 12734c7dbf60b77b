"""The loop that recovery runs in: it knows its time, shows where it is, and can be stopped and resumed."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LoRunError
from ..network.batches import Batch, Batches, is_finite
from ..util.nested import to_device
from ..util.progress import progress
from .distill import Distillation
from .duration import Duration, schedule
from .processes import agreed, make_accelerator
from .speed import MARGIN, bfloat16, rounding_psnr, runs_in_bfloat16
from .state_file import read_state, write_state
from .supervised import Supervised
from .trained import TrainedTensor

CHECKS = 25  # in a run: how often it is looked whether the network got better
HELD_OUT = 2  # batches that are looked at for that
IN_A_ROW = 5  # returns after NaN, or batches with NaN, after which there is nothing to hope for
SMALLEST = 0.01  # what a tensor's values are taken for where they are smaller, as when they start at zero
SIDE = 512  # of the matrices that SOAP keeps for a tensor; longer dimensions go without


@dataclass
class Run:
    """Where a run is; what it resumes from."""

    step: int = 0
    seconds: float = 0.0
    damping: float = 1.0  # of the learning rate: halved with each rollback
    rollbacks: int = 0
    skipped: int = 0
    best: float = math.inf
    worse: int = 0  # checks since then
    bfloat16: bool = False


class Trainer:
    """Trains some tensors of the student of a :class:`Distillation`, in place.

    Args:
        distillation: what to minimise.
        trained: the tensors, in an order that is the same in each run.
        calibration: what to train on.
        duration: when to end.
        seed: of all that is random; the same seed gives the same tensors, to the bit on a CPU, for
            a duration in steps.
        resume_from: a file that holds the state of the run while it lasts. Where it is there, the run
            goes on from it, and draws again, without computing, the batches that were used up.
        kind: names the run, so that it does not resume from another one.
        spent: seconds of the duration that preparations took.
        held_out: finite batches by which it is judged whether the tensors got better; by default the first ones of
            ``calibration``.
        doing: what the progress bar says.
        others: what, beside the trained tensors, resuming is to bring back; by default all that the student holds.
        patience: checks without a better one after which it ends, as further steps would only fit what it trains on.
    """

    def __init__(
        self,
        distillation: Distillation | Supervised,
        trained: Sequence[TrainedTensor],
        calibration: Batches,
        duration: Duration,
        *,
        seed: int,
        resume_from: Path | None,
        kind: str,
        spent: float = 0.0,
        held_out: Sequence[Batch] = (),
        patience: int | None = None,
        doing: str = "recovering",
        others: Sequence[Tensor] | None = None,
    ) -> None:
        self.others = others
        self.held_out, self.patience, self.doing = list(held_out), patience, doing
        self.distillation, self.trained, self.calibration = distillation, trained, calibration
        self.duration, self.seed, self.resume_from = duration, seed, resume_from
        self.accelerator = make_accelerator()
        shapes = [tuple(item.parameter.shape) for item in trained]
        self.kind = f"{kind}, seed {seed}, {self.accelerator.num_processes} processes, {shapes}"
        self._clear_gradients()
        for item in trained:
            if item.parameter.dtype in (torch.float16, torch.bfloat16):
                raise LoRunError(
                    f"expected weights of 32 bits or more to train, found {item.parameter.dtype}: convert in float32, "
                    "and save_pretrained(path, dtype=torch.float16) afterwards"
                )
        self.loss_of = self.accelerator.prepare(distillation)
        # SOAP knows no complex numbers: it is given views of them, as pairs of real ones.
        self.tensors = [_real(item.parameter) for item in trained]
        self.rates = [item.rate * max(_rms(item.parameter), SMALLEST) for item in trained]
        self.optimizer, self.prepared = self._fresh_optimizer()
        self.run = Run(seconds=agreed(spent))
        self.best = self._values()
        self._rounding = math.inf
        self._shown: dict[str, str] = {}

    def train(self, stop: threading.Event) -> bool:
        """Train until the duration is used up, or ``stop`` is set; the best tensors that were seen are left in place.

        Returns:
            Whether it ran to the end.

        Raises:
            LoRunError: a calibration that ends, or a loss that stays NaN; the tensors are the best ones then too.
        """
        try:
            self._loop(stop)
        except KeyboardInterrupt:  # in a batch that is being made, or where no signal handler can be
            stop.set()
        finally:
            self._put(self.best)
            self._clear_gradients()
        if stop.is_set():
            return False
        if self.resume_from is not None and self.accelerator.is_main_process:
            self.resume_from.unlink(missing_ok=True)
        return True

    def _loop(self, stop: threading.Event) -> None:
        if self._stopped(stop):
            return
        if self.resume_from is not None and self.resume_from.exists():
            self._resume(self.resume_from)
        run, processes = self.run, self.accelerator.num_processes
        held_out = self.held_out or list(
            itertools.islice(filter(is_finite, itertools.islice(self.calibration, HELD_OUT + IN_A_ROW)), HELD_OUT)
        )
        if not held_out:
            raise LoRunError(f"expected finite batches, found NaN or Inf in the first {HELD_OUT + IN_A_ROW}: mend them")
        own = itertools.islice(self.calibration, run.step * processes + self.accelerator.process_index, None, processes)
        started = time.monotonic() - run.seconds
        with self._bar() as bar:
            if not run.step:
                run.bfloat16 = runs_in_bfloat16(self.distillation, held_out[0], self.seed)
            if run.bfloat16:
                self._rounding = rounding_psnr(self.distillation, held_out[0], self.seed)
            if not run.step:
                self._check(held_out, bar)
                if not math.isfinite(run.best):
                    raise LoRunError(
                        "expected finite outputs before training, found NaN or Inf: run both networks on the first "
                        "batches of calibration"
                    )
            while (done := self.duration.done(run.seconds, run.step)) < 1 and not self._in_vain():
                batch = self._drawn(own, stop)
                if self._stopped(stop) or batch is None:
                    self._save()
                    return
                loss = self._step(batch, done)
                run.step += 1
                run.seconds = agreed(time.monotonic() - started)
                bar.update(_whole(self.duration, run) - bar.n)
                self._show(bar, step=str(run.step), loss=f"{loss:.3g}")
                after = self.duration.done(run.seconds, run.step)
                if math.floor(CHECKS * after) > math.floor(CHECKS * done):
                    self._check(held_out, bar)
                    self._save()

    # --- one step --------------------------------------------------------------------------------

    def _step(self, batch: Batch, done: float) -> float:
        run = self.run
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * run.damping * schedule(done)
        seed = self.seed + run.step * self.accelerator.num_processes + self.accelerator.process_index
        with bfloat16(run.bfloat16):
            loss = self.loss_of(lambda: batch, seed)[0]
        value = self._agreed_worst(float(loss.detach()))
        if not math.isfinite(value):
            if math.isfinite(self._agreed_worst(0.0 if is_finite(batch) else math.nan)):
                self._roll_back(f"the loss is {value} at step {run.step}")
            else:
                self._skip(f"NaN or Inf in the batch of step {run.step}")
            return value
        run.skipped = 0
        self.accelerator.backward(loss)
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

    def _skip(self, found: str) -> None:
        self.run.skipped += 1
        if self.run.skipped > IN_A_ROW:
            raise LoRunError(f"expected finite batches, found {found} and in {IN_A_ROW} before: mend the calibration")
        warnings.warn(f"found {found}: it is left out", stacklevel=2)

    def _roll_back(self, found: str) -> None:
        run = self.run
        run.rollbacks += 1
        if run.rollbacks > IN_A_ROW:
            raise LoRunError(
                f"expected a finite loss, found that {found}, after {IN_A_ROW} returns to the best weights with "
                "ever smaller steps: check the calibration for NaN and the network for overflow"
            )
        run.damping /= 2
        self._put(self.best)
        self.optimizer, self.prepared = self._fresh_optimizer()
        self._clear_gradients()
        warnings.warn(f"{found}: going on from the best weights so far, with half the learning rate", stacklevel=2)

    def _fresh_optimizer(self) -> tuple[SOAP, Any]:
        groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(self.tensors, self.rates)]
        optimizer = SOAP(groups, weight_decay=0.0, max_precondition_dim=SIDE)
        return optimizer, self.accelerator.prepare(optimizer)

    # --- how good it is --------------------------------------------------------------------------

    def _check(self, held_out: Sequence[Batch], bar: tqdm) -> None:
        """Keep the tensors if they are the best so far."""
        with torch.no_grad():
            seen = [self.distillation(lambda b=batch: b, self.seed + i)[1:] for i, batch in enumerate(held_out)]
        value, psnr = (self._agreed_worst(sum(map(float, column)) / len(seen)) for column in zip(*seen))
        if not math.isfinite(value):
            if self.run.step:
                self._roll_back(f"the loss on held-out batches is {value} at step {self.run.step}")
            return
        self.run.rollbacks = 0
        if math.isnan(psnr):  # to the truth: no rounding shows
            self._show(bar, held_out=f"{value:.3g}")
        else:
            self.run.bfloat16 = self.run.bfloat16 and psnr < self._rounding - MARGIN
            self._show(bar, psnr=f"{psnr:.2f}")
        self.run.worse += 1
        if value <= self.run.best:
            self.run.best, self.run.worse, self.best = value, 0, self._values()

    def _in_vain(self) -> bool:
        return self.patience is not None and self.run.worse >= self.patience

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
        """Whether to stop, as the main process says, so that none waits for another."""
        if agreed(stop.is_set()):
            stop.set()
            return True
        return False

    def _drawn(self, batches: Iterator[Batch], stop: threading.Event) -> Batch | None:
        """The next batch, or None where Ctrl-C came in between."""
        try:
            return next(batches)
        except KeyboardInterrupt:
            stop.set()
        except Exception:  # a loader's worker that Ctrl-C has ended
            if not stop.is_set():
                raise
        return None

    # --- several processes -----------------------------------------------------------------------

    def _agreed_worst(self, value: float) -> float:
        """A value that is not finite, where any process has one, and else the mean."""
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
            "others": [tensor.clone() for tensor in self._others()],
            "optimizer": [self.optimizer.state.get(tensor, {}) for tensor in self.tensors],
            "counts": [group.get("step", 0) for group in self.optimizer.param_groups],
        }
        write_state(self.resume_from, self.kind, state)

    def _others(self) -> list[Tensor]:
        """What the start of a run has set but no step changes: buffers, and what the authors don't train."""
        trained = {item.parameter.data_ptr() for item in self.trained}
        held = self.distillation.student.state_dict().values() if self.others is None else self.others
        return [tensor for tensor in held if tensor.data_ptr() not in trained]

    def _resume(self, path: Path) -> None:
        state = read_state(path, self.kind)
        self.run, self.best, self.rates = Run(**state["run"]), state["best"], state["rates"]
        self._put(state["values"])
        for tensor, value in zip(self._others(), state["others"]):
            tensor.copy_(value)
        for tensor, group, held, count in zip(
            self.tensors, self.optimizer.param_groups, state["optimizer"], state["counts"]
        ):
            group["step"] = count
            if held:
                self.optimizer.state[tensor].update(to_device(held, tensor.device))

    # --- what is seen ----------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        return progress(
            None,
            self.doing,
            "step" if self.duration.steps else "s",
            total=_whole(self.duration, None),
            initial=_whole(self.duration, self.run),
            disable=not self.accelerator.is_main_process,
        )

    def _show(self, bar: tqdm, **values: str) -> None:
        self._shown |= values
        bar.set_postfix(self._shown, refresh=False)


def _whole(duration: Duration, run: Run | None) -> int:
    """Where the bar is, or ends: seconds or steps."""
    if duration.steps:
        return run.step if run else duration.steps
    return round(run.seconds if run else 60 * (duration.minutes or 0))


def _real(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.view_as_real(parameter.detach())) if parameter.is_complex() else parameter


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().abs().square().mean().sqrt())


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is not cut in two; the second one interrupts."""
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
