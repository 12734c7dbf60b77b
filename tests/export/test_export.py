"""Files that run without this package: they compute the same, and hold the base once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conversions import relative
from peft import LoraConfig
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.cli.main import cli
from lorun_adapt.conversion import conversions
from lorun_adapt.export.onnx import save_onnx
from lorun_adapt.export.program import export_program, save_program
from lorun_adapt.export.sets import inputs_of_sets, save_sets
from lorun_adapt.peft_format.options import config_of_ranks

TASK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        make = lambda: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                                     nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))
        self.stages = nn.ModuleList(make() for _ in range(3))
    def forward(self, y):
        for stage in self.stages:
            y = y + 0.1 * stage(y)
        return y
patch = 12
def build(): return Net()
def measure(images, sigma=0.0): return (images,)
def restore(output, images): return output.clamp(0, 1)
"""


class Stage(nn.Module):
    def __init__(self, width: int, transform: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(width, width, 3, 3) / width)
        self.body, self.tail = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(self.head(x).relu(), self.kernel, padding=1)
        return x + 0.1 * self.tail(self.body(self.transform(hidden)))


class Net(nn.Module):
    def __init__(self, width: int = 16, stages: int = 3, **settings: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(width, **settings) for _ in range(stages))

    def forward(self, y: Tensor) -> Tensor:
        for stage in self.stages:
            y = stage(y)
        return y


def measure(side: int, images: int) -> tuple[Tensor]:
    return (torch.rand(images, 1, side, side),)


def run_onnx(path: Path, *arguments: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), arguments)}
    return torch.as_tensor(session.run(None, feed)[0])


@pytest.fixture(params=["base", "no base", "merged"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    net = Net(32)
    if request.param == "no base":
        names = ["kernel", "body.weight"]
        config = config_of_ranks(dict.fromkeys(names, 4))
        return lorun_adapt.LoRunModel(*conversions(net, config, without_base=names)).network
    lorun = lorun_adapt.convert(net, rank=4)
    if request.param == "merged":
        lorun.merge_adapter()
    return lorun.network


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_computes_the_same(network: nn.Module, dynamic: bool, tmp_path: Path) -> None:
    program = export_program(network, measure, 12, dynamic)
    difference, inputs = save_onnx(program, tmp_path / "net.onnx")
    assert 0 < difference < 1e-4 and not inputs
    for arguments in [measure(17, 3), measure(8, 1)] if dynamic else [measure(12, 1)]:
        with torch.no_grad():
            assert relative(run_onnx(tmp_path / "net.onnx", *arguments), network(*arguments)) < 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_computes_the_same(network: nn.Module, dynamic: bool, tmp_path: Path) -> None:
    save_program(export_program(network, measure, 12, dynamic), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert str(Path(lorun_adapt.__file__).parent).encode() not in (tmp_path / "net.pt2").read_bytes()
    for arguments in [measure(17, 3), measure(8, 1)] if dynamic else [measure(12, 1)]:
        with torch.no_grad():
            assert relative(loaded(*arguments), network(*arguments)) < 1e-5


def test_the_base_is_in_the_file_once(tmp_path: Path) -> None:
    net = Net(64, stages=9)
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    lorun = lorun_adapt.convert(net, rank=8)
    save_onnx(export_program(lorun.network, measure, 12), tmp_path / "net.onnx")
    plain, ours = ((tmp_path / name).stat().st_size for name in ("plain.safetensors", "net.onnx"))
    assert ours < 0.35 * plain


def test_what_onnx_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    net = Net(transform=lambda x: torch.view_as_real(torch.fft.fft2(x).tile(1, 1, 1, 1)).sum(-1))
    (tmp_path / "net.onnx").write_text("mine")
    program = export_program(lorun_adapt.convert(net, rank=2).network, measure, 12)
    with pytest.raises(lorun_adapt.LoRunError, match=r"^ONNX cannot hold this network \(.*\): save it as .pt2$"):
        save_onnx(program, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "mine"
    save_program(program, tmp_path / "net.pt2")


def test_a_network_that_cannot_be_traced() -> None:
    net = Net(transform=lambda x: x if x.sum() > 0 else -x)
    lorun = lorun_adapt.convert(net, rank=2)
    with pytest.raises(lorun_adapt.LoRunError, match="^torch.export cannot trace .*: have its forward use no"):
        export_program(lorun.network, measure, 12)


class Physics(nn.Module):
    """An argument that is no tensor, as deepinv's networks take."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))


class WithPhysics(Net):
    def forward(self, y: Tensor, physics: Physics, scale: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(y * physics.gain * scale.value)


class Scale:
    value = 0.5


@pytest.mark.parametrize("dynamic", [False, True])
def test_objects_among_the_arguments_become_part_of_the_file(dynamic: bool, tmp_path: Path) -> None:
    network = lorun_adapt.convert(WithPhysics(), rank=2).network
    physics = Physics(3.0)

    def with_physics(side: int, images: int) -> tuple[Any, ...]:
        return (*measure(side, images), physics, Scale())

    exported = export_program(network, with_physics, 12, dynamic)
    save_program(exported, tmp_path / "net.pt2")
    save_onnx(exported, tmp_path / "net.onnx")
    x, *rest = with_physics(16, 3) if dynamic else with_physics(12, 1)
    with torch.no_grad():
        expected = network(x, *rest)
        assert relative(torch.export.load(tmp_path / "net.pt2").module()(x), expected) < 1e-5
        assert relative(run_onnx(tmp_path / "net.onnx", x), expected) < 1e-4


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    program = export_program(Net(), measure, 12)
    with pytest.raises(lorun_adapt.LoRunError, match=r'onnxruntime is missing: pip install "lorun-adapt\[onnx\]"'):
        save_onnx(program, tmp_path / "net.onnx")


class TwoArguments(Net):
    """Also reads a parameter outside of its stages, and takes an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, y: Tensor, scale: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(y * self.gain * (1 if scale is None else scale.value))


def noisy_set_of(lorun: lorun_adapt.LoRunModel) -> None:
    """Add the set ``noisy``, in which every tensor is half as large again, and so is the gain."""
    lorun.finetune([torch.rand(2, 1, 12, 12)] * 4, "noisy", also="gain", steps=1, loss=lambda x, _: x.mean())
    with torch.no_grad():
        held = lorun.converted().sets["noisy"]
        for tensor in [*lorun.adapters["noisy"].parameters(), *held.outside.values()]:
            tensor.mul_(1.5)
    lorun.set_adapter("default")


@pytest.mark.parametrize("arguments", [(), (Scale(),)])
def test_one_onnx_file_serves_all_sets(arguments: tuple[Any, ...], tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(TwoArguments(), rank=2).eval()
    noisy_set_of(lorun)
    exported = export_program(lorun.network, lambda *size: (*measure(*size), *arguments), 12, dynamic=True)
    sets = inputs_of_sets(lorun, exported.run)
    assert list(sets) == ["default", "noisy"] and "gain" in sets["default"].tensors
    difference, inputs = save_onnx(exported, tmp_path / "net.onnx", sets)
    assert difference < 1e-4 and inputs == sets["noisy"].tensors.keys()
    files = save_sets(sets, inputs, tmp_path / "net.onnx")
    assert [file.name for file in files] == ["net.default.safetensors", "net.noisy.safetensors"]
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (y,) = measure(16, 3)
    results = []
    for name, given in [("default", {}), *zip(sets, map(load_file, files))]:
        feed = {session.get_inputs()[0].name: y.numpy(), **given}
        lorun.set_adapter(name)
        with torch.no_grad():
            results.append(torch.as_tensor(session.run(None, feed)[0]))
            assert relative(results[-1], lorun(y, *arguments)) < 1e-4
    assert relative(results[1], results[2]) > 0.01


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(r=3), "differ in more than their values: stages.0.kernel|differ in more than their values: stages"),
        (LoraConfig(r=2, lora_alpha=8), "'default' and 'other' scale .* by 1 and 4: export each"),
    ],
)
def test_sets_of_other_ranks_or_scalings_cannot_share_a_file(config: LoraConfig, message: str) -> None:
    lorun = lorun_adapt.convert(Net(), rank=2)
    lorun.add_adapter("other", config)
    with pytest.raises(lorun_adapt.LoRunError, match=message):
        inputs_of_sets(lorun, lambda network: network(*measure(12, 1)))
    assert lorun.active_adapters == ["default"]


def test_a_set_that_the_file_computes_differently_is_noticed(tmp_path: Path) -> None:
    """Such as one whose noise schedule writes a number that is no tensor into the network."""
    lorun = lorun_adapt.convert(TwoArguments(), rank=2).eval()
    noisy_set_of(lorun)
    exported = export_program(lorun.network, measure, 12)
    sets = inputs_of_sets(lorun, exported.run)
    sets["noisy"] = sets["noisy"]._replace(outputs=[2 * tensor for tensor in sets["noisy"].outputs])
    with pytest.raises(lorun_adapt.LoRunError, match="the ONNX file computes something else"):
        save_onnx(exported, tmp_path / "net.onnx", sets)
    assert not list(tmp_path.iterdir())


def test_a_file_that_returns_nan_is_not_written(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(Net(transform=lambda x: torch.log(-1 - x.relu())), rank=2)
    with pytest.raises(lorun_adapt.LoRunError, match="a difference of nan"):
        save_onnx(export_program(lorun.network, measure, 12), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("low_rank", [False, True])
def test_sparse_terms_are_exported(low_rank: bool, tmp_path: Path) -> None:
    network = lorun_adapt.convert(Net(), lorun_adapt.SparseConfig(2, low_rank)).network
    exported = export_program(network, measure, 12)
    save_onnx(exported, tmp_path / "net.onnx")
    with torch.no_grad():
        assert relative(run_onnx(tmp_path / "net.onnx", *exported.arguments), network(*exported.arguments)) < 1e-4


def test_the_command_exports_a_set(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    task = lorun_adapt.load_task(str(tmp_path / "task.py"))
    lorun = lorun_adapt.convert(task.build(), rank=2)
    lorun.copy_adapter("default", "other")
    with torch.no_grad():
        for parameter in lorun.adapters["other"].parameters():
            parameter.mul_(1.5)
    lorun.save_pretrained(tmp_path / "saved")
    images = torch.rand(1, 1, 12, 12)
    for name in ("default", "other"):
        lorun.set_adapter(name)
        arguments = ["export", str(tmp_path / "saved"), "--task", task.name, "--out", str(tmp_path / "net.onnx")]
        shown = CliRunner().invoke(cli, [*arguments, "--adapter-name", name])
        assert shown.exit_code == 0, shown.output
        assert "of PyTorch's" in shown.output
        with torch.no_grad():
            assert relative(run_onnx(tmp_path / "net.onnx", images), lorun.eval()(images)) < 1e-4
    shown = CliRunner().invoke(cli, [*arguments, "--adapters-as-inputs"])
    assert shown.exit_code == 0 and "net.other.safetensors (" in shown.output, shown.output
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    feed = {session.get_inputs()[0].name: images.numpy(), **load_file(tmp_path / "net.other.safetensors")}
    with torch.no_grad():
        assert relative(torch.as_tensor(session.run(None, feed)[0]), lorun(images)) < 1e-4
    refused = CliRunner().invoke(cli, ["export", "x", "--task", "y", "--out", "x.pt2", "--adapters-as-inputs"])
    assert refused.exit_code == 2 and "--adapters-as-inputs is for .onnx files" in refused.output
    refused = CliRunner().invoke(cli, ["export", "x", "--task", "y", "--out", "net.bin"])
    assert refused.exit_code == 2
    assert "expected a file that ends in .onnx or .pt2, found 'net.bin'" in refused.output
