"""A budget of parameters: kept, and spent on what keeps most."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import torch
from dun_zoo import ZOO, Block, Denoiser, ListOfBlocks
from recovery_runs import measurements, teacher
from safetensors.torch import load_file
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.conversion import conversions
from lorun_adapt.factorise.allocate import allocate
from lorun_adapt.network.batches import Batch, Batches
from lorun_adapt.network.report import make_report
from lorun_adapt.peft_format.options import config_of_ranks
from lorun_adapt.training.duration import Duration


def least_budget(net: nn.Module) -> int:
    """What the error names, for a budget that is too small."""
    with pytest.raises(LoRunError, match="at least [0-9,]+ parameters") as caught:
        lorun_adapt.convert(net, budget=1)
    return int(re.findall("at least ([0-9,]+) parameters", str(caught.value))[0].replace(",", ""))


@pytest.mark.parametrize(
    "name", sorted(set(ZOO) - {"looped", "one_block_many_times", "ends_around_a_loop", "shared_body"})
)
def test_budget_is_kept(name) -> None:
    net = ZOO[name]().net
    before = sum(p.numel() for p in net.parameters())
    least = least_budget(net)
    assert least <= lorun_adapt.convert(net, rank=1).num_parameters()
    for budget in (least, (least + before) // 2, 0.9):
        limit = budget if budget >= 1 else int(budget * before)
        if limit < least:
            continue
        lorun = lorun_adapt.convert(net, budget=budget)
        assert lorun.num_parameters() <= limit
    with pytest.raises(LoRunError, match=f"at least {least:,} parameters"):
        lorun_adapt.convert(net, budget=least - 1)


def test_budget_buys_what_keeps_most() -> None:
    net = teacher()
    with torch.no_grad():
        for block in net.blocks[1:]:  # one tensor alike in all stages, so that any rank is wasted on it
            for a, b in zip(block.parameters(), net.blocks[0].parameters()):
                if a.ndim == 4 and a.shape[:2] == (8, 8):
                    a.copy_(b)
                    break
    least = lorun_adapt.convert(net, rank=1).num_parameters()
    ranks = lorun_adapt.convert(net, budget=least + 300).stage_map.ranks
    found = [rank for tensors in ranks.values() for rank in tensors.values()]
    assert min(found) == 1 < max(found)
    for bad in (0, -5, True, "half", 10.5):
        with pytest.raises(LoRunError, match="budget"):
            lorun_adapt.convert(net, budget=bad)
    with pytest.raises(LoRunError, match="rank and budget exclude each other"):
        lorun_adapt.convert(net, budget=0.5, rank=2)


class TwoWays(Denoiser):
    """One way has large weights and shows little in the output, the other shows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.shown = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.hidden.weight.data.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        head = torch.relu(self.head(x))
        return x + self.tail(1e-4 * self.hidden(head) + self.shown(head))


def test_budget_is_spent_on_what_the_output_is_sensitive_to() -> None:
    torch.manual_seed(0)
    net = ListOfBlocks([Block(TwoWays()) for _ in range(3)]).eval()
    for p in net.parameters():
        p.data.mul_(1.5)
    budget = least_budget(net) + 800
    ranks = lorun_adapt.convert(net, budget=budget).stage_map.ranks["denoiser"]
    assert ranks["denoiser.hidden.weight"] > ranks["denoiser.shown.weight"] == 1
    lorun = lorun_adapt.convert(net, budget=budget, calibration=measurements(), steps=5)
    ranks = lorun.stage_map.ranks["denoiser"]
    assert ranks["denoiser.shown.weight"] > ranks["denoiser.hidden.weight"] == 1
    assert lorun.num_parameters() <= budget


@pytest.mark.parametrize("repeatable, drawn", [(False, 1), (True, 4)])
def test_weighing_keeps_to_its_time_unless_a_run_is_to_resume(repeatable, drawn) -> None:
    def slow() -> Iterator[Batch]:
        for batch in measurements():
            time.sleep(0.05)
            yield batch

    batches = Batches(slow())
    duration = Duration(minutes=1e-4)
    conversions(teacher(), budget=0.9, calibration=batches, duration=duration, repeatable=repeatable)
    assert batches.drawn == drawn


@pytest.mark.parametrize("base", [True, False])
def test_all_tensors_can_be_given_a_base_or_none(base) -> None:
    net = teacher()
    stage_map, before = lorun_adapt.find_stages(net), sum(p.numel() for p in net.parameters())
    names = {spec.name for spec in stage_map.groups[0].tensors if spec.smaller(1)}
    for budget in (0.8, 0.95):
        found = allocate(net, stage_map, budget, base=base)
        assert found.without_base == (frozenset() if base else names) and found.ranks.keys() == names
        (converted,) = conversions(net, config_of_ranks(found.ranks), without_base=found.without_base)
        assert make_report(converted).network_after.num_parameters <= budget * before
    with pytest.raises(LoRunError, match="at least [0-9,]+ parameters"):
        allocate(net, stage_map, 10, base=base)


def test_a_budget_goes_to_a_base_only_where_stages_have_much_in_common(tmp_path) -> None:
    net = teacher()
    body = "denoiser.body.weight"
    with torch.no_grad():
        for block in net.blocks[1:]:
            kernel = block.get_parameter(body)
            kernel.copy_(net.blocks[0].get_parameter(body) + 0.05 * kernel)
    lorun = lorun_adapt.convert(net, budget=0.6)
    tensors = lorun.stage_map.groups[0].tensors
    assert {spec.name: spec.without_base for spec in tensors if spec.smaller(1)}[body] is False
    without = [spec.name for spec in tensors if spec.without_base]
    assert without  # the other kernels are drawn anew for each stage
    report, adapted = lorun.report(), sum(spec.smaller(1) for spec in tensors)
    assert (report.num_without_base, report.num_adapted) == (len(without), adapted)
    assert f"{len(without)} of {adapted} adapted tensors have no shared base" in str(report)
    assert "no shared base" not in str(lorun_adapt.convert(net, rank=2).report())
    for name in without:
        base = lorun.base.get_parameter(f"blocks.0.{name}")
        assert not base.any() and not base.requires_grad

    lorun.recover(net, measurements(), steps=3)
    assert not any(lorun.base.get_parameter(f"blocks.0.{name}").any() for name in without)
    lorun.save_pretrained(tmp_path / "saved")
    held = load_file(tmp_path / "saved/base.safetensors")
    assert f"blocks.0.{body}" in held and not any(f"blocks.0.{name}" in held for name in without)
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    batch = next(iter(measurements()))
    assert torch.equal(loaded(*batch), lorun(*batch))
    assert loaded.num_parameters() == lorun.num_parameters() <= 0.6 * sum(p.numel() for p in net.parameters())
    assert loaded.report().network_after.num_parameters == loaded.num_parameters()
    assert loaded.fingerprint == lorun.fingerprint
    torch.testing.assert_close(loaded.merge_and_unload()(*batch), lorun(*batch))
