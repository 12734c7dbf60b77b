"""Trials: where a budget leaves bases out, a short recovery shows whether they would have paid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recovery_runs import Stopping, measurements, same, teacher, values
from tasks import call

import lorun_adapt
from lorun_adapt import conversion
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


def test_minutes_hold_everything(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(lorun_adapt.LoRunModel, "recover", lambda self, *_, minutes, **__: seen.append(minutes) or True)
    net = teacher()
    candidates = [lorun_adapt.convert(net, rank=rank) for rank in (1, 6)]
    recover_best(candidates, net, measurements(), Duration(minutes=20))
    assert seen == pytest.approx([2, 2, 16], abs=0.1)


def test_the_command_tries_too(short, monkeypatch, capsys, tmp_path, task_file, weights, images) -> None:
    arguments = [task_file, "--weights", weights, "--calibration", images, "--steps", 40, "--budget", BUDGET]
    code, _, found = call(capsys, monkeypatch, "convert", *arguments, "--out", tmp_path / "saved")
    assert code == 0 and "going on" in found
