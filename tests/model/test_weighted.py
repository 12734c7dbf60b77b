"""Sets that are weighted sums of others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conversions import train_a_bit
from dun_zoo import ZOO, Case
from peft import LoraConfig
from torch import Tensor

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel


def with_two_sets(case: Case, tmp_path, ranks: tuple[int, int] = (2, 3)) -> LoRunModel:
    """``a`` and ``b`` on one base, of different ranks, trained."""
    lorun = lorun_adapt.convert(case.net, rank=ranks[0], **case.find())
    other = lorun_adapt.convert(case.net, LoraConfig(r=ranks[1], lora_alpha=5), **case.find())
    other.base.load_state_dict(lorun.base.state_dict())
    for name, one in (("a", lorun), ("b", other)):
        train_a_bit(one, case.inputs)
        one._fingerprint = None
        one.save_pretrained(tmp_path / name)
        lorun.load_adapter(tmp_path / name / "adapters/default", name)
    return lorun.eval()


def dense(lorun: LoRunModel, name: str) -> dict[str, Tensor]:
    lorun.set_adapter(name)
    return dict(lorun.merge_and_unload().state_dict())


def differences(lorun: LoRunModel, name: str) -> dict[str, Tensor]:
    base = lorun.base.state_dict()
    return {key: (value - base[key]).double() for key, value in dense(lorun, name).items() if value.is_floating_point()}


@pytest.fixture
def lorun(tmp_path) -> LoRunModel:
    return with_two_sets(ZOO["list_of_blocks"](), tmp_path)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.5), (0.3, 0.9)])
def test_the_sum_of_what_each_adds(lorun: LoRunModel, weights: tuple[float, float]) -> None:
    a, b = differences(lorun, "a"), differences(lorun, "b")
    lorun.add_weighted_adapter(["a", "b"], weights, "both")
    both = differences(lorun, "both")
    adapted = set(lorun.stage_map.adapted(lorun.stage_map.groups[0]))
    checked = 0
    for key, found in both.items():
        wanted = weights[0] * a[key] + weights[1] * b[key]
        if key.split(".", 2)[2] in adapted:
            wanted = nearest(wanted.flatten(1), 3).view_as(wanted)
            checked += 1
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert checked == 4 * len(adapted) > 0


def test_one_set_by_itself_is_that_set(lorun: LoRunModel) -> None:
    lorun.add_weighted_adapter(["b"], [1.0], "same")
    for key, value in dense(lorun, "b").items():
        torch.testing.assert_close(dense(lorun, "same")[key], value, atol=1e-5, rtol=1e-4)
    lorun.add_weighted_adapter(["a", "b"], [0.0, 0.0], "nothing")
    for value in differences(lorun, "nothing").values():
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)


def test_it_is_saved_and_trains_like_any_other(lorun: LoRunModel, tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both")
    lorun.set_adapter("both")
    train_a_bit(lorun, case.inputs)
    output = lorun(*case.inputs)
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", case.net)
    assert loaded.active_adapters[0] == "both"
    assert torch.equal(loaded(*case.inputs), output)


def test_a_set_may_be_replaced_by_its_own_sum(lorun: LoRunModel) -> None:
    a, b = differences(lorun, "a"), differences(lorun, "b")
    lorun.set_adapter("a")
    lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "a")
    key = "blocks.1.step"
    torch.testing.assert_close(differences(lorun, "a")[key], (a[key] + b[key]) / 2)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "c"], [1, 1], "no adapter set 'c' among"),
        (["a"], [1, 1], "as many weights as adapters"),
        ([], [], "as many weights as adapters"),
        ("ab", [1, 1], "as many weights as adapters"),
        (["a", "b"], [1, float("nan")], "finite numbers"),
        (["a", "b"], [1, "2"], "finite numbers"),
        (["a", "b"], [1e300, 1e300], "give NaN or Inf in"),
    ],
)
def test_what_cannot_be_summed(lorun: LoRunModel, names, weights, message: str) -> None:
    with pytest.raises(LoRunError, match=message):
        lorun.add_weighted_adapter(names, weights, "new")
    assert "new" not in lorun.adapter_names


def test_a_set_that_diverged_is_named(lorun: LoRunModel) -> None:
    lorun.add_weighted_adapter(["a", "b"], [np.float32(0.5), np.int64(1)], "of_numpy")
    with torch.no_grad():
        next(p for name, p in lorun.adapters["b"].named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(LoRunError, match="the set 'b' has NaN or Inf in its tensors"):
        lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")


def test_only_stages_in_common(lorun: LoRunModel, tmp_path) -> None:
    lorun.load_adapter(tmp_path / "b/adapters/default", "one", stage=2)
    lorun.add_weighted_adapter(["a", "one"], [0.5, 0.5], "sum")
    assert list(lorun.adapters["sum"]) == ["stage_02"]
    lorun.load_adapter(tmp_path / "b/adapters/default", "two", stage=3)
    with pytest.raises(LoRunError, match="no stage in common"):
        lorun.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")


def test_whole_numbers_that_differ(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    for index, block in enumerate(case.net.blocks):
        block.register_buffer("count", torch.tensor(index))
    lorun = with_two_sets(case, tmp_path)
    lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "same")
    group = lorun.stage_map.groups[0]
    counts = [lorun.adapter_of(group, site, "same").count.item() for site in group.sites]
    assert counts == [0, 1, 2, 3]
    lorun.adapter_of(group, group.sites[1], "b").count.fill_(9)
    with pytest.raises(LoRunError, match="'count' holds whole numbers that differ"):
        lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")


def test_counters_that_are_alike_need_no_weights() -> None:
    case = ZOO["list_of_denoisers"]()
    net = type(case.net)([torch.nn.Sequential(d, torch.nn.BatchNorm2d(1)) for d in case.net.denoisers]).eval()
    lorun = lorun_adapt.convert(net, rank=2)
    lorun.copy_adapter("default", "b")
    lorun.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    own = {n: t for n, t in lorun.adapters["sum"].state_dict().items() if "num_batches_tracked" in n}
    assert own and all(
        torch.equal(tensor, lorun.adapters["default"].state_dict()[name]) for name, tensor in own.items()
    )
