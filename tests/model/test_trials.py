"""Trials: where a budget leaves bases out, a short recovery shows whether they would have paid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recovery_runs import Stopping, interrupted_at_step, launch, measurements, same, teacher, values
from tasks import call

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel, conversion
from lorun_adapt.model import trials
from lorun_adapt.model.trials import recover_best
from lorun_adapt.training import duration, recovery
from lorun_adapt.training.duration import Duration
from lorun_adapt.training.trainer import Trainer

BUDGET = 0.8


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 40 steps are long enough for trials, each of 4 steps."""
    monkeypatch.setattr(duration, "LEAST_STEPS", 40)
    monkeypatch.setattr(conversion, "TRIED_BELOW", 1.0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parameters of the network in each step."""
    seen: list[int] = []
    step = Trainer._step

    def counted(self: Trainer, *arguments: object) -> float:
        seen.append(sum(parameter.numel() for parameter in self.optimised.parameters))
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counted)
    return seen


def test_the_closest_one_goes_on(steps, capsys) -> None:
    net = teacher()
    poor, good = (lorun_adapt.convert(net, rank=rank) for rank in (1, 6))
    chosen, finished = recover_best([poor, good], net, measurements(), Duration(steps=50))
    assert chosen is good and finished
    sizes = list(dict.fromkeys(steps))
    assert [steps.count(size) for size in sizes] == [5, 50]
    found = capsys.readouterr().err
    assert "trial 1 of 2: with a base for every tensor" in found and "going on with a base for every tensor" in found


def test_a_budget_tries_bases_where_there_is_time(short, steps, monkeypatch, capsys) -> None:
    """It keeps to the steps and to the budget, and begins in closed form once for each."""
    net, fitted = teacher(), []
    with pytest.MonkeyPatch.context() as patch:
        fit = recovery.fit_in_closed_form
        patch.setattr(recovery, "fit_in_closed_form", lambda *arguments: fitted.append(fit(*arguments)))
        lorun = lorun_adapt.convert(net, budget=BUDGET, calibration=measurements(), steps=40)
    assert "trial 2 of 2: with a base for every tensor" in capsys.readouterr().err
    assert len(steps) == 44 and len(set(steps)) == 2 and len(fitted) == 2
    assert lorun.num_parameters() <= BUDGET * sum(p.numel() for p in net.parameters())
    for below, length in ((1.0, 39), (0.5, 40)):
        monkeypatch.setattr(conversion, "TRIED_BELOW", below)
        steps.clear()
        lorun_adapt.convert(net, budget=BUDGET, calibration=measurements(), steps=length)
        assert len(steps) == length and "trial" not in capsys.readouterr().err


@pytest.mark.parametrize("bases", [True, False])
def test_what_was_better_in_the_trial_goes_on(bases, short, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trials, "_error", lambda lorun, *_: float((lorun.report().num_without_base == 0) is not bases))
    lorun = lorun_adapt.convert(teacher(), budget=BUDGET, calibration=measurements(), steps=40)
    assert (lorun.report().num_without_base == 0) is bases
    which = "with a base for every tensor" if bases else "without a base for"
    assert f"going on {which}" in capsys.readouterr().err


def test_there_is_nothing_to_try_where_bases_have_no_room(short, steps, capsys) -> None:
    net = teacher()
    least = lorun_adapt.convert(net, budget=0.5)
    lorun_adapt.convert(net, budget=least.num_parameters(), calibration=measurements(), steps=40)
    assert len(steps) == 40 and "trial" not in capsys.readouterr().err


@pytest.mark.parametrize("bases", [True, False])
def test_a_run_resumes_with_what_was_chosen(bases, short, monkeypatch, tmp_path, capsys) -> None:
    net = teacher()
    monkeypatch.setattr(trials, "_error", lambda lorun, *_: float((lorun.report().num_without_base == 0) is not bases))

    def run(calibration: object, state: Path) -> lorun_adapt.LoRunModel:
        return lorun_adapt.convert(net, budget=BUDGET, calibration=calibration, steps=60, resume_from=state)

    whole = run(measurements(60), tmp_path / "whole")
    with pytest.warns(UserWarning, match="recovery was stopped"):
        run(Stopping(58, "exception"), tmp_path / "state")
    assert (tmp_path / "state").exists()
    capsys.readouterr()
    again = run(measurements(60), tmp_path / "state")
    assert same(values(again), values(whole)) and "trial" not in capsys.readouterr().err


def test_an_interrupt_ends_a_trial_and_the_run(steps) -> None:
    net = teacher()
    candidates = [lorun_adapt.convert(net, rank=rank) for rank in (1, 6)]
    seen = []

    class Interrupting(torch.nn.Module):
        def forward(self, output: torch.Tensor, batch: object) -> torch.Tensor:
            seen.append(1)
            if len(seen) > 60:
                raise KeyboardInterrupt
            return output.square().mean()

    with pytest.warns(UserWarning, match="recovery was stopped"):
        chosen, finished = recover_best(candidates, net, measurements(), Duration(steps=500), loss=Interrupting())
    assert chosen is candidates[0] and not finished and len(set(steps)) == 1


def two_ranks(net: torch.nn.Module) -> list[LoRunModel]:
    return [lorun_adapt.convert(net, rank=rank) for rank in (1, 6)]


def interrupt(*_: object) -> float:
    raise KeyboardInterrupt


def test_an_interrupt_in_the_second_trial_keeps_the_first(monkeypatch) -> None:
    net = teacher()
    first, second = candidates = two_ranks(net)
    recover = LoRunModel.recover
    monkeypatch.setattr(
        LoRunModel, "recover", lambda self, *args, **more: self is first and recover(self, *args, **more)
    )
    chosen, finished = recover_best(candidates, net, measurements(), Duration(steps=100))
    assert chosen is first and not finished


def test_an_interrupt_between_trials_keeps_what_there_is(monkeypatch) -> None:
    net = teacher()
    candidates = two_ranks(net)
    monkeypatch.setattr(trials, "_error", interrupt)
    chosen, finished = recover_best(candidates, net, measurements(), Duration(steps=100))
    assert chosen is candidates[0] and not finished


@pytest.mark.parametrize("failing", [0, 1])
def test_a_trial_that_fails_does_not_end_the_run(failing, monkeypatch, capsys) -> None:
    net = teacher()
    candidates = two_ranks(net)
    recover = LoRunModel.recover

    def failing_once(self: LoRunModel, *args: object, **more: object) -> bool:
        if self is candidates[failing]:
            raise LoRunError("the loss stays NaN")
        return recover(self, *args, **more)

    monkeypatch.setattr(LoRunModel, "recover", failing_once)
    chosen, finished = recover_best(candidates, net, measurements(), Duration(steps=50))
    assert chosen is candidates[1 - failing] and finished
    found = capsys.readouterr().err
    assert f"trial {failing + 1} failed: the loss stays NaN" in found and "going on with a base" in found


def test_an_error_that_all_trials_meet_is_raised() -> None:
    net = teacher()
    with pytest.raises(LoRunError, match="no parameter outside the stages matches"):
        recover_best(two_ranks(net), net, measurements(), Duration(steps=50), also="nothing.*")


@pytest.mark.parametrize("errors", [(float("nan"), 3.0), (float("inf"), 3.0), (1.0, 0.5), (1.0, float("nan"))])
def test_an_error_that_is_no_number_is_the_worst(errors, monkeypatch) -> None:
    net = teacher()
    candidates = two_ranks(net)
    left = list(errors)
    monkeypatch.setattr(trials, "_error", lambda *_: left.pop(0))
    chosen, _ = recover_best(candidates, net, measurements(), Duration(steps=20))
    assert chosen is candidates[errors[1] == errors[1]]


@pytest.mark.parametrize("seconds, number", [(0.0, 3), (1.0, 1)])
def test_minutes_hold_everything(seconds, number, monkeypatch) -> None:
    """There are no trials where a tenth of the minutes is too short for 40 steps of 3.5 forwards."""
    seen = []
    clock = [0.0]
    monkeypatch.setattr(LoRunModel, "recover", lambda self, *_, minutes, **__: seen.append(minutes) or True)
    monkeypatch.setattr(trials.time, "monotonic", lambda: clock[0])
    net = teacher()
    candidates = two_ranks(net)
    net.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + seconds))
    recover_best(candidates, net, measurements(), Duration(minutes=20))
    assert seen == pytest.approx([2, 2, 16] if number == 3 else [20 - 1 / 60])  # a forward takes a second
    assert trials._rest(Duration(minutes=20), 600, 2).minutes == 10


@pytest.mark.parametrize("size, number", [(1 << 30, 32), (5 * 4 * 2 * 64 * 4, 5)])
def test_trials_keep_few_large_batches(size, number, monkeypatch) -> None:
    """The long run goes on from the batch after them."""
    seen = []
    net = teacher()
    monkeypatch.setattr(trials, "MAX_BYTES", size)

    def recover(self: LoRunModel, net: object, calibration: list[tuple[torch.Tensor, ...]], **_: object) -> bool:
        seen.append(calibration)
        return True

    batches = [(y, mask.expand_as(y).clone()) for y, mask in measurements(40)]
    monkeypatch.setattr(LoRunModel, "recover", recover)
    recover_best(two_ranks(net), net, batches, Duration(steps=500))
    assert [len(part) for part in seen[:2]] == [number - trials.JUDGED] * 2
    assert torch.equal(next(seen[2])[0], batches[number][0])


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 13])
def test_a_run_resumes_within_its_trials(at, short, monkeypatch, tmp_path, capsys) -> None:
    """The first trial, or the second one, was stopped after so many of the steps of both."""
    net = teacher()

    def run(state: Path) -> LoRunModel:
        return lorun_adapt.convert(net, budget=BUDGET, calibration=measurements(60), steps=80, resume_from=state)

    whole = run(tmp_path / "whole")
    with interrupted_at_step(at), pytest.warns(UserWarning, match="recovery was stopped"):
        run(tmp_path / "state")
    known = ["state.trial1"] if at == 4 else ["state.trial1", "state.trial2"]
    assert sorted(path.name for path in tmp_path.glob("state*")) == known
    assert same(values(run(tmp_path / "state")), values(whole))
    assert not list(tmp_path.glob("*.trial*"))


LAUNCHED = """
import sys
import time
import torch
from safetensors.torch import save_file
from recovery_runs import measurements, teacher
import lorun_adapt
from lorun_adapt.model import trials
from lorun_adapt.training.duration import Duration
from lorun_adapt.training.processes import process_state

torch.set_num_threads(1)
trials.LEAST_STEPS = 0  # however slow the machine is, there is time for trials
state = process_state()
net = teacher()
candidates = [lorun_adapt.convert(net, rank=rank) for rank in (1, 6)]
minutes = Duration(minutes=(6 if state.is_main_process else 9) / 60)  # one of them was slower to start
chosen, _ = trials.recover_best(candidates, net, measurements(), minutes)
values = {name: tensor.contiguous() for name, tensor in chosen.state_dict().items()}
total = torch.cat([tensor.double().flatten() for tensor in values.values()]).sum()[None]
sums = [torch.zeros_like(total) for _ in range(2)]
torch.distributed.all_gather(sums, total)
assert torch.equal(*sums)
if state.is_main_process:
    save_file({"chosen": torch.tensor(candidates.index(chosen))}, sys.argv[1])
"""


@pytest.mark.slow
def test_processes_agree_about_the_minutes(tmp_path) -> None:
    assert launch(LAUNCHED, tmp_path)["chosen"] == 1


def test_the_command_tries_too(short, monkeypatch, capsys, tmp_path, task_file, weights, images) -> None:
    arguments = [task_file, "--weights", weights, "--calibration", images, "--steps", 40, "--budget", BUDGET]
    code, _, found = call(capsys, monkeypatch, "convert", *arguments, "--out", tmp_path / "saved")
    assert code == 0 and "going on" in found
