"""Merged weights while a set runs, and weights that are computed once in a forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conversions import convert_fully, relative, train_a_bit
from dun_zoo import ZOO, Case
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.terms.lowrank import LowRank
from lorun_adapt.util.toy import ToyUnfoldingNet


@pytest.fixture
def lorun() -> lorun_adapt.LoRunModel:
    torch.manual_seed(0)
    lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
    train_a_bit(lorun, (torch.rand(1, 1, 8, 8),))
    lorun.copy_adapter("default", "other")
    train_a_bit(lorun, (torch.rand(1, 1, 8, 8),))
    return lorun.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(1, 1, 8, 8)


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[LowRank]:
    """The terms whose tensors were computed, in order."""
    seen: list[LowRank] = []
    forward = LowRank.forward

    def counted(self: LowRank, base: Tensor) -> Tensor:
        seen.append(self)
        return forward(self, base)

    monkeypatch.setattr(LowRank, "forward", counted)
    return seen


def test_every_network_computes_the_same_merged(case: Case, composed: list[LowRank]) -> None:
    lorun = convert_fully(case, rank=2)
    train_a_bit(lorun, case.inputs)
    with torch.no_grad():
        expected = lorun(*case.inputs)
        lorun.merge_adapter()
        composed.clear()
        assert relative(lorun(*case.inputs), expected) < 1e-6
        assert not composed
        lorun.unmerge_adapter()
        assert torch.equal(lorun(*case.inputs), expected)
        assert composed


def test_a_swap_drops_merged_weights(lorun: lorun_adapt.LoRunModel, x: Tensor, composed: list[LowRank]) -> None:
    expected = lorun(x)
    lorun.merge_adapter()
    lorun.set_adapter("other")
    other = lorun(x)
    assert composed
    assert not torch.equal(other, expected)
    lorun.set_adapter("default")
    assert torch.equal(lorun(x), expected)
    assert lorun.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("how", ["train", "recover", "finetune"])
def test_training_drops_merged_weights(lorun: lorun_adapt.LoRunModel, x: Tensor, how: str) -> None:
    lorun.merge_adapter()
    assert lorun.get_nb_trainable_parameters()[0] == 0
    with pytest.raises(RuntimeError, match="does not require grad"):
        lorun(x).sum().backward()
    before = lorun(x)
    if how == "train":
        lorun.train()
        train_a_bit(lorun, (x,))
    else:
        if how == "recover":
            lorun.delete_adapter("other")
            lorun.recover(ToyUnfoldingNet(), [x], steps=2)
        else:
            lorun.finetune([(x,)] * 8, "mine", sigma=5, teacher=ToyUnfoldingNet(), steps=2)
    assert not torch.equal(lorun(x), before)


def test_what_replaces_the_running_set_is_merged(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    with torch.no_grad():
        lorun.set_adapter("other")
        other = lorun(x)
        lorun.set_adapter("default")
        lorun.merge_adapter()
        lorun.add_weighted_adapter(["other"], [1.0], "default")
        assert relative(lorun(x), other) < 1e-6
        assert lorun.get_nb_trainable_parameters()[0] == 0


def test_merged_weights_follow_the_dtype_and_a_state_dict(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    state = {name: value.clone() for name, value in lorun.state_dict().items()}
    with torch.no_grad():
        expected = lorun(x)
        lorun.merge_adapter()
        assert relative(lorun.double()(x.double()), expected.double()) < 1e-5
        lorun.float().load_state_dict({name: 2 * value for name, value in state.items()})
        assert relative(lorun(x), expected) > 0.01
        lorun.load_state_dict(state)
        assert relative(lorun(x), expected) < 1e-6


def test_merged_weights_are_in_no_file_and_no_list(lorun: lorun_adapt.LoRunModel, x: Tensor, tmp_path: Any) -> None:
    names, count = list(lorun.state_dict()), len(list(lorun.parameters()))
    lorun.merge_adapter()
    assert list(lorun.state_dict()) == names
    assert len(list(lorun.parameters())) == count
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", ToyUnfoldingNet()).eval()
    with torch.no_grad():
        assert relative(loaded(x), lorun(x)) < 1e-6
        copied = copy.deepcopy(lorun)
        assert torch.equal(copied(x), lorun(x))
        copied.unmerge_adapter()
        assert relative(copied(x), lorun(x)) < 1e-6


def test_the_base_runs_within_disable_adapter(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    with torch.no_grad():
        expected = lorun(x)
        with lorun.disable_adapter():
            base = lorun(x)
            lorun.merge_adapter()
            assert torch.equal(lorun(x), base)
        assert relative(lorun(x), expected) < 1e-6
        with lorun.disable_adapter():
            lorun.unmerge_adapter()
            assert torch.equal(lorun(x), base)
        assert torch.equal(lorun(x), expected)


def test_weights_merged_in_inference_mode_pass_gradients_on(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    lorun.merge_adapter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), lorun.disable_adapter():
        pass
    expected = lorun.merge_and_unload()(x)
    found = lorun(x.requires_grad_())
    assert relative(found, expected) < 1e-6
    found.sum().backward()
    assert x.grad is not None


def test_weights_that_are_not_finite_are_refused(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    with torch.no_grad():
        next(lorun.adapters["default"].parameters()).fill_(float("nan"))
    with pytest.raises(LoRunError, match="has NaN or Inf: merge sets from before training diverged"):
        lorun.merge_adapter(safe_merge=True)
    assert lorun.get_nb_trainable_parameters()[0] > 0


def test_compiled_whole(lorun: lorun_adapt.LoRunModel, x: Tensor) -> None:
    with torch.no_grad():
        lorun.merge_adapter()
        expected = lorun(x)
        compiled = torch.compile(lorun, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        lorun.set_adapter("other")
        assert not torch.equal(compiled(x), expected)


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu() @ self.weight + x @ self.weight


def test_each_weight_is_computed_once_in_a_forward_without_gradients(composed: list[LowRank]) -> None:
    net = nn.Sequential(*[ReadsTwice() for _ in range(3)])
    lorun = lorun_adapt.convert(net, rank=2)
    x = torch.rand(4, 16)
    with_gradients = lorun(x)
    assert len(composed) == 9
    composed.clear()
    with torch.no_grad():
        assert torch.equal(lorun(x), with_gradients)
        assert len(composed) == 3
        with torch.no_grad():
            next(lorun.adapters.parameters()).mul_(2)
        assert not torch.equal(lorun(x), with_gradients)
    assert len(composed) == 6
    composed.clear()
    with torch.no_grad(), torch.enable_grad():
        assert lorun(x).requires_grad
    assert len(composed) == 9


def test_a_weight_that_is_read_more_often_than_before_is_right(composed: list[LowRank]) -> None:
    class Branches(ReadsTwice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x @ self.weight

    lorun = lorun_adapt.convert(nn.Sequential(*[Branches() for _ in range(3)]), rank=2)
    with torch.no_grad():
        for x in (-torch.ones(4, 16), torch.ones(4, 16), -torch.ones(4, 16)):
            assert relative(lorun(x), lorun.merge_and_unload()(x)) < 1e-6


def test_a_looped_stage_does_not_see_the_call_before() -> None:
    case = ZOO["looped"]()
    lorun = convert_fully(case, rank=2)
    train_a_bit(lorun, case.inputs)
    with torch.no_grad():
        assert torch.equal(lorun(*case.inputs), lorun.network(*case.inputs))
