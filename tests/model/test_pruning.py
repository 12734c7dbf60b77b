"""Iterative magnitude pruning with rewinding, during recovery."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recovery_runs import distance, interrupted_at_step, measurements, same, teacher, values

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel, SparseConfig
from lorun_adapt.terms.sparse import Sparse
from lorun_adapt.terms.term import Term
from lorun_adapt.training import recovery
from lorun_adapt.training.trainer import Trainer


def sparse(rank: int = 3, **settings: bool) -> tuple[torch.nn.Module, LoRunModel]:
    net = teacher()
    return net, lorun_adapt.convert(net, SparseConfig(rank, target_modules=["body"], **settings))


def terms(lorun: LoRunModel) -> list[Sparse]:
    return [module for module in lorun.adapters.modules() if isinstance(module, Term)]


@pytest.mark.parametrize("low_rank", [False, True])
def test_it_ends_at_the_rank(low_rank: bool, monkeypatch, capsys) -> None:
    """In rounds of equal length, which together take the steps, with the closed form once."""
    net, lorun = sparse(low_rank=low_rank)
    fitted, steps = [], []
    fit, step = recovery.fit_in_closed_form, Trainer._step
    monkeypatch.setattr(recovery, "fit_in_closed_form", lambda *arguments: fitted.append(fit(*arguments)))
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: steps.append(terms(lorun)[0].rank) or step(self, *args))
    assert lorun.recover(net, measurements(), prune=1, steps=60)
    assert {term.rank for term in terms(lorun)} == {1} and len(fitted) == 1
    assert len(steps) == 60 and steps == sorted(steps, reverse=True)
    assert [steps.count(rank) for rank in (3, 2, 1)] == [20, 20, 20]
    assert "pruned to rank 1" in capsys.readouterr().err
    assert lorun.stage_map.ranks == {"denoiser": {"denoiser.body.weight": 1}}


def test_training_rewinds(monkeypatch) -> None:
    """Each round begins with the values after a fifth of the first one, private tensors and base too."""
    net, lorun = sparse()
    began, ended = [], []
    recover = LoRunModel.recover

    def watched(self: LoRunModel, *args: object, prune: int | None = None, **more: object) -> bool:
        if prune is not None:
            return recover(self, *args, prune=prune, **more)
        began.append({name: value.clone() for name, value in self.state_dict().items()})
        finished = recover(self, *args, **more)
        ended.append({name: value.clone() for name, value in self.state_dict().items()})
        return finished

    monkeypatch.setattr(LoRunModel, "recover", watched)
    lorun.recover(net, measurements(), prune=1, steps=100)
    early = ended[0]
    assert len(began) == 4 and not same(ended[1], early)
    for later in began[2:]:
        for name, value in later.items():
            if name.endswith(".values"):
                places = name.replace(".values", ".places")
                dense, kept = torch.zeros(576), torch.zeros(576)
                dense[early[places].long()] = early[name].flatten()
                kept[later[places].long()] = value.flatten()
                assert torch.equal(kept[kept != 0], dense[kept != 0])
            elif not name.endswith(".places"):
                assert torch.equal(value, early[name])


@pytest.mark.slow
def test_pruning_in_rounds_beats_pruning_at_once() -> None:
    net, lorun = sparse()
    lorun.recover(net, measurements(), prune=1, steps=200)
    _, at_once = sparse()
    at_once.recover(net, measurements(), steps=200)
    held = at_once.converted().sets["default"]
    for stage in held.adapters.values():
        for adapter in stage.values():
            for name, term in list(adapter._modules.items()):
                adapter.add_module(name, term.pruned(1, term))
    with torch.no_grad():
        at_once._put("default", held)
    assert distance(lorun, net) < 0.5 * distance(at_once, net)


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 30, 50])
def test_a_stopped_run_goes_on_to_the_bit(at: int, monkeypatch, tmp_path) -> None:
    def run(state: Path) -> LoRunModel:
        net, lorun = sparse()
        lorun.recover(net, iter(measurements(90)), prune=1, steps=60, resume_from=state)
        return lorun

    whole = run(tmp_path / "whole")
    with interrupted_at_step(at), pytest.warns(UserWarning, match="recovery was stopped"):
        run(tmp_path / "state")
    assert same(values(run(tmp_path / "state")), values(whole))
    with pytest.warns(UserWarning, match="was over already"):
        assert same(values(run(tmp_path / "state")), values(whole))
    assert not list(tmp_path.glob("*.round*"))


def test_minutes_are_kept(monkeypatch) -> None:
    seen = []
    recover = LoRunModel.recover

    def noted(self: LoRunModel, *args: object, prune: int | None = None, minutes: float = 0, **more: object) -> bool:
        if prune is not None:
            return recover(self, *args, prune=prune, minutes=minutes, **more)
        seen.append(minutes)
        return True

    monkeypatch.setattr(LoRunModel, "recover", noted)
    net, lorun = sparse()
    lorun.recover(net, measurements(), prune=1, minutes=12)
    assert sum(seen) == pytest.approx(12, abs=0.05) and seen[0] == pytest.approx(0.25 * seen[1])


@pytest.mark.parametrize("rank", [0, 3, 4, 1.5, True])
def test_other_ranks_are_refused(rank) -> None:
    net, lorun = sparse()
    before = values(lorun)
    with pytest.raises(LoRunError, match="expected a rank from 1 to 2 for prune"):
        lorun.recover(net, measurements(), prune=rank, steps=10)
    assert same(values(lorun), before)


def test_a_state_file_of_another_run_changes_nothing(tmp_path) -> None:
    net, lorun = sparse()
    lorun.recover(net, measurements(), steps=5, resume_from=tmp_path / "state")
    net, lorun = sparse()
    before = values(lorun)
    with pytest.raises(LoRunError, match="belongs to another run"):
        lorun.recover(net, measurements(), prune=1, steps=50, seed=3, resume_from=tmp_path / "state")
    assert same(values(lorun), before)


def test_fewer_steps_than_rounds_are_refused() -> None:
    net, lorun = sparse()
    with pytest.raises(LoRunError, match="expected more than 3 steps to prune in rounds, found 2"):
        lorun.recover(net, measurements(), prune=1, steps=2)


def test_other_terms_and_further_sets_are_refused() -> None:
    net = teacher()
    with pytest.raises(LoRunError, match="the terms have rank 1 already"):
        sparse(1)[1].recover(net, measurements(), prune=1, steps=10)
    with pytest.raises(LoRunError, match="only sparse terms can be pruned"):
        lorun_adapt.convert(net, rank=2).recover(net, measurements(), prune=1, steps=10)
    _, lorun = sparse()
    lorun.copy_adapter("default", "other")
    with pytest.raises(LoRunError, match="recovery changes the base, which the sets"):
        lorun.recover(net, measurements(), prune=1, steps=10)
