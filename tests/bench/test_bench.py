"""The table of times and sizes: what is compared computes the same, and the sizes are right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conversions import relative
from dun_zoo import ZOO
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.bench import bench as module
from lorun_adapt.bench.alternatives import ALTERNATIVES, Unsuited, peft_layers
from lorun_adapt.bench.bench import MERGED, OURS, PLAIN, Result, bench
from lorun_adapt.bench.timing import MIN_ROUNDS, Times, interleaved
from lorun_adapt.cli.main import cli
from lorun_adapt.util.nested import tensors_in

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[2] / "examples"


class Stage(nn.Module):
    """A denoiser of layers alone, which PEFT can represent."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.body(self.head(x).relu()).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(3))

    def forward(self, y: Tensor) -> Tensor:
        for stage in self.stages:
            y = stage(y)
        return y


def inputs(side: int, batch: int) -> tuple[Tensor]:
    return (torch.rand(batch, 1, side, side),)


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    net = Net()
    return bench(net, lorun_adapt.convert(net, rank=2), inputs, size=20, device=CPU, seconds=0)


def cell(result: Result, name: str, column: str) -> Any:
    return next(row for row in result.rows if row.name == name).cells.get(column)


def test_all_columns_and_rows_are_there(result: Result) -> None:
    assert result.missing == {}
    (shown,) = result.tables()
    assert [str(column.header) for column in shown.columns] == ["", PLAIN, OURS, MERGED, *ALTERNATIVES]
    timed = [row for row in result.rows if isinstance(row.cells[OURS], Times)]
    names = [row.name for row in timed]
    assert names[:3] == ["inference, batch 1, 20x20", "inference, batch 8, 20x20", "inference, batch 1, 16x16"]
    assert {"training step, all", "training step, low-rank factors only", "swap from memory", "swap from disk"} < set(
        names
    )
    assert all(len(times.seconds) >= MIN_ROUNDS for row in timed for times in row.cells.values())
    for name in ("swap from memory", "swap from disk"):
        assert cell(result, name, "PEFT set_adapter").median > 0


def test_sizes_are_those_of_the_tensors(result: Result) -> None:
    net = Net()
    lorun = lorun_adapt.convert(net, rank=2)
    plain = sum(4 * p.numel() for p in net.parameters())
    assert cell(result, "bytes of weights in memory", PLAIN) == plain
    ours = cell(result, "bytes of weights in memory", OURS)
    assert ours == sum(4 * p.numel() for p in lorun.parameters())
    assert cell(result, "bytes of weights in memory", MERGED) > plain
    assert cell(result, "bytes of weights in memory", "parametrization") <= ours
    saved = cell(result, "bytes saved for backward", PLAIN)
    assert 0.5 * saved < cell(result, "bytes saved for backward", OURS) < 2 * saved
    assert cell(result, "files: network and one set", PLAIN) > plain


def test_json_has_all_numbers(result: Result) -> None:
    data = json.loads(json.dumps(result.as_dict()))
    assert data["setting"].startswith("20x20 pixels, cpu")
    assert data["rows"]["training step, all"][OURS]["median"] > 0
    assert data["rows"]["files: each further set"][OURS] > 0


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_alternatives_compute_the_same_and_share_the_base(name: str) -> None:
    net = Net()
    lorun = lorun_adapt.convert(net, rank=2)
    (x,) = inputs(12, 2)
    network = ALTERNATIVES[name](lorun)
    assert relative(network(x), lorun(x)) < 1e-6
    storages = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert {p.untyped_storage().data_ptr() for p in lorun.base.parameters()} & storages


def test_peft_has_no_layer_for_some_tensors() -> None:
    case = ZOO["list_of_raw_kernels"]()
    lorun = lorun_adapt.convert(case.net, rank=2)
    with pytest.raises(Unsuited, match="no layer for the tensors"):
        peft_layers(lorun)


def test_an_alternative_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(lorun: lorun_adapt.LoRunModel) -> nn.Module:
        return Net()

    monkeypatch.setitem(ALTERNATIVES, "parametrization", wrong)
    net = Net()
    found = bench(net, lorun_adapt.convert(net, rank=2), inputs, size=8, device=CPU, seconds=0)
    assert found.missing == {"parametrization": "the network computes something else with it"}
    assert all("parametrization" not in row.cells for row in found.rows)


def test_a_loop_has_no_alternatives() -> None:
    case = ZOO["looped"]()
    lorun = lorun_adapt.convert(case.net, rank=2, example_inputs=case.inputs)

    def images(side: int, batch: int) -> tuple[Tensor, Tensor]:
        return torch.rand(batch, 1, side, side), torch.ones(1, 1, side, side)

    found = bench(case.net, lorun, images, size=8, device=CPU, seconds=0)
    assert set(found.missing) == set(ALTERNATIVES)
    assert cell(found, "bytes saved for backward", OURS) > 0


def test_nothing_of_the_users_changes() -> None:
    net = Net().train()
    lorun = lorun_adapt.convert(net, rank=2).train()
    before = {name: value.clone() for name, value in {**net.state_dict(), **lorun.state_dict()}.items()}
    trainable = [p.requires_grad for p in (*net.parameters(), *lorun.parameters())]
    bench(net, lorun, inputs, size=8, device=CPU, seconds=0)
    after = {**net.state_dict(), **lorun.state_dict()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in (*net.parameters(), *lorun.parameters())] == trainable
    assert all(p.grad is None for p in (*net.parameters(), *lorun.parameters()))
    assert (net.training, lorun.training, lorun.adapter_names) == (True, True, ["default"])


def test_functions_run_in_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0, CPU)
    assert order == ["a", "b"] * (MIN_ROUNDS + 1)
    assert [len(found.seconds) for found in times.values()] == [MIN_ROUNDS, MIN_ROUNDS]
    assert Times((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3.0
    assert Times((1.0, 2.0, 3.0, 4.0, 100.0)).spread == pytest.approx(1 / 3)


def test_images_of_a_size_that_the_network_cannot_take() -> None:
    net = Net()

    def fails(side: int, batch: int) -> tuple[Tensor]:
        return (torch.rand(batch, 2, side, side),)

    with pytest.raises(lorun_adapt.LoRunError, match=r"cannot run on 8x8 pixels \(.*\): give another --size"):
        bench(net, lorun_adapt.convert(net, rank=2), fails, size=8, device=CPU, seconds=0)


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measured(net: nn.Module, lorun: lorun_adapt.LoRunModel, inputs: Any, **settings: Any) -> Result:
        seen.update(settings, arguments=inputs(settings["size"], 2))
        found = {PLAIN: Times((0.2, 0.2)), OURS: Times((0.3, 0.3))}
        sizes = {PLAIN: 2000, OURS: 500}
        rows = (module.Row("inference", found), module.Row("bytes", sizes))
        return Result("here", rows, {"PEFT layers": "no layers"})

    monkeypatch.setattr(module, "bench", measured)
    task = str(EXAMPLES / "compressive_sensing.py")
    shown = CliRunner().invoke(cli, ["bench", task, "--seconds", "0"])
    assert shown.exit_code == 0, shown.output
    assert seen["size"] == 128
    assert tensors_in(seen["arguments"])
    for text in ("200.00 ms ±0 %", "1.50 ±0 %", "2.0 kB", "0.25", "no column 'PEFT layers': no layers"):
        assert text in shown.output
    printed = CliRunner().invoke(cli, ["bench", task, "--size", "32", "--json"])
    assert json.loads(printed.stdout)["rows"]["bytes"] == {PLAIN: 2000, OURS: 500}
    assert seen["size"] == 32
    refused = CliRunner().invoke(cli, ["bench", task, "--converted", "x", "--rank", "2"])
    assert refused.exit_code == 2
    assert "--rank is for a conversion made here" in refused.output


def test_the_command_measures_a_conversion(tmp_path: Path) -> None:
    task = lorun_adapt.load_task(str(EXAMPLES / "compressive_sensing.py"))
    net = task.build()
    task.load_weights(net, None)
    lorun_adapt.convert(copy.deepcopy(net), rank=2).save_pretrained(tmp_path / "saved")
    arguments = ["bench", task.name, "--converted", str(tmp_path / "saved"), "--size", "33", "--seconds", "0", "--json"]
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0, printed.output
    rows = json.loads(printed.stdout)["rows"]
    assert rows["files: network and one set"][OURS] < rows["files: network and one set"][PLAIN]
