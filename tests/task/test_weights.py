"""Checkpoints as authors publish them, and files that are none."""

from __future__ import annotations

import argparse
import collections
import io
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file, save_model
from tasks import COLOUR_TASK, call
from torch import Tensor, nn

from lorun_adapt import LoRunError
from lorun_adapt.task.task import load_task
from lorun_adapt.task.weights import choose_state, mismatch, read_states

State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 1)))


def load(path: Path, net: nn.Module, key: str | None = None) -> State:
    return choose_state(read_states(path), net, path, key)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"params_ema": s},
        lambda s: {"model": {"state_dict": s}, "epoch": 1},
        lambda s: {"whatever": {"the": {"key": s}}, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
        lambda s: {"net": s, "discriminator": nn.Linear(1, 1).state_dict()},
        lambda s: prefixed(s, "module."),
        lambda s: prefixed(s, "_orig_mod.module."),
        lambda s: prefixed(s, "module._orig_mod."),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_as_they_come(tmp_path: Path, wrap: Any, legacy: bool) -> None:
    net = network()
    torch.save(wrap(net.state_dict()), tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    found = load(tmp_path / "net.pt", net)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


class OnlyModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = network()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda net: nn.DataParallel(torch.compile(net))])
def test_wrapped_networks_load_their_own_checkpoints_and_plain_ones(tmp_path: Path, wrap: Any) -> None:
    for plain in (network(), OnlyModule()):
        wrapped = wrap(plain)
        for saved in (plain, wrapped):
            for net in (plain, wrapped):
                torch.save(saved.state_dict(), tmp_path / "net.pt")
                net.load_state_dict(load(tmp_path / "net.pt", net))


def test_tied_tensors_under_one_of_their_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = network(), nn.Linear(3, 3)
            self.again, self.step = self.first, nn.Parameter(torch.rand(1))
            self.other.bias = self.first.first.bias

    net, fresh = Tied(), Tied()
    save_model(net, str(tmp_path / "net.safetensors"))
    assert len(read_states(tmp_path / "net.safetensors")[""]) < len(net.state_dict())
    fresh.load_state_dict(load(tmp_path / "net.safetensors", fresh))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh.state_dict().values()))
    del net.step
    save_model(net, str(tmp_path / "net.safetensors"))
    with pytest.raises(RuntimeError, match=r'Missing key.*"step"'):
        fresh.load_state_dict(load(tmp_path / "net.safetensors", fresh))


def test_of_several_weights_the_averaged_ones(tmp_path: Path) -> None:
    net = network()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    for plain, averaged in (("params", "params_ema"), ("model", "ema"), ("state_dict", "model_ema.state")):
        content: dict[str, Any] = {plain: zeros}
        inner = averaged.split(".")
        content[inner[0]] = net.state_dict() if len(inner) == 1 else {inner[1]: net.state_dict()}
        torch.save(content, tmp_path / "net.pt")
        with pytest.warns(UserWarning, match=f"'{plain}', '{averaged}': loading the averaged ones, '{averaged}'"):
            assert load(tmp_path / "net.pt", net)["first.weight"].any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not load(tmp_path / "net.pt", net, plain)["first.weight"].any()
    with pytest.raises(LoRunError, match="no weights under the key 'other' in .*: choose one of 'state_dict', 'model_"):
        load(tmp_path / "net.pt", net, "other")
    torch.save({"a": zeros, "b": net.state_dict()}, tmp_path / "net.pt")
    with pytest.warns(UserWarning, match="under 'a', 'b': loading 'a'; choose"):
        load(tmp_path / "net.pt", net)


def test_averages_of_torch_and_moments_of_optimisers(tmp_path: Path) -> None:
    net = network()
    average = torch.optim.swa_utils.AveragedModel(net)
    moments = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    torch.save({"model": moments, "swa": average.state_dict()}, tmp_path / "net.pt")
    with pytest.warns(UserWarning, match="loading the averaged ones, 'swa'"):
        assert load(tmp_path / "net.pt", net)["first.weight"].any()
    torch.save(average.state_dict(), tmp_path / "net.pt")
    assert load(tmp_path / "net.pt", net).keys() == net.state_dict().keys()
    for key, inner in (("optimizer", "exp_avg"), ("adam", "max_exp_avg_sq"), ("optim", "average")):
        torch.save({"model": net.state_dict(), key: {inner: moments}}, tmp_path / "net.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path / "net.pt", net)["first.weight"].any()


def test_the_key_on_the_command_line_and_in_the_task(tmp_path: Path, capsys, monkeypatch) -> None:
    task = tmp_path / "task.py"
    task.write_text(COLOUR_TASK)
    net = load_task(task).build()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    torch.save({"params": zeros, "ema": net.state_dict()}, tmp_path / "net.pt")
    arguments = ("inspect", task, "--weights", tmp_path / "net.pt")
    assert call(capsys, monkeypatch, *arguments, "--weights-key", "params")[0] == 0
    code, _, err = call(capsys, monkeypatch, *arguments, "--weights-key", "other")
    assert code == 2 and "no weights under the key 'other'" in err
    task.write_text(COLOUR_TASK + "\nweights = 'net.pt'\nweights_key = 'params'\n")
    load_task(task).load_weights(net, None)
    assert not any(parameter.any() for parameter in net.parameters())
    task.write_text(COLOUR_TASK + "\nweights = 'net.pt'\n\ndef load(path, net):\n    return net.state_dict()\n")
    with pytest.raises(LoRunError, match=r"load\(\) of its own, which takes no --weights-key"):
        load_task(task).load_weights(net, None, "params")


def tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("net.pth")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("net.pth", content)
    return buffer.getvalue()


def saved(value: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


WHOLE = saved({"w": torch.zeros(1000)})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"is empty \(0 bytes\): download it again"),
        (b"\n <!DOCTYPE html><html>404</html>", "is a web page: download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer.*git lfs pull"),
        (tar(WHOLE), "is a tar archive: unpack it"),
        (b"\x1f\x8b" + bytes(30), "is compressed: unpack it"),
        (zipped(WHOLE), "is a zip archive: unpack it"),
        (bytes(600), "is no file of torch or safetensors"),
        (WHOLE[: len(WHOLE) // 2], "is cut off or damaged: download it again"),
        (saved({"w": torch.zeros(1000)}, legacy=True)[:3000], "is cut off or damaged: download it again"),
        (save({"w": torch.zeros(1000)})[:500], "is a damaged safetensors file"),
        (b"\0" * 30, "is no file of torch or safetensors: download it again"),
        (b"not a checkpoint", "is no file of torch or safetensors"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(LoRunError, match=f"net{suffix} {message}") as caught:
        read_states(path)
    assert "weights_only=False" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_safetensors_under_any_suffix(tmp_path: Path) -> None:
    for name in ("net.safetensors", "net.pth", "net"):
        save_file(network().state_dict(), tmp_path / name)
        assert load(tmp_path / name, network()).keys() == network().state_dict().keys()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value, named",
    [
        ({"args": argparse.Namespace(a=1), "state_dict": {"w": torch.zeros(1)}}, "argparse.Namespace"),
        (nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_more_than_tensors_is_named(tmp_path: Path, value: object, named: str, legacy: bool) -> None:
    (tmp_path / "net.pth").write_bytes(saved(value, legacy))
    with pytest.raises(LoRunError, match=f"net.pth holds more than tensors.*{named}.*state_dict alone") as caught:
        read_states(tmp_path / "net.pth")
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value", [np.float64(31.5), np.arange(6).reshape(2, 3), np.array(["a", None]), np.str_("best")]
)
def test_numbers_of_numpy_beside_the_weights_are_left_out(tmp_path: Path, value: object, legacy: bool) -> None:
    (tmp_path / "net.pth").write_bytes(saved({"best": value, "state_dict": {"w": torch.ones(1)}}, legacy))
    assert read_states(tmp_path / "net.pth") == {"state_dict": {"w": torch.ones(1)}}
    (tmp_path / "net.pth").write_bytes(saved({"w": value}, legacy))
    with pytest.raises(LoRunError, match=r"found a dict of 'w' \(OfNumPy\): define load"):
        read_states(tmp_path / "net.pth")


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "weights_a": {"x": 1}}, tmp_path / "odd.pt")
    with pytest.raises(LoRunError, match=r"'epoch' \(int\), 'weights_a' \(dict\): define load\(path, net\)"):
        read_states(tmp_path / "odd.pt")


STAGES = {f"stages.{k}.weight": torch.zeros(1) for k in range(9)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: prefixed(s, "net."), "all names in the file have the prefix 'net.'"),
        (lambda s: prefixed(s, "a.b."), "all names in the file have the prefix 'a.b.'"),
        (
            lambda s: {**s, **STAGES},
            "^unexpected stages.0.weight, stages.1.weight, .*stages.5.weight and 3 more$",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "first.bias"}, "^missing first.bias$"),
        (lambda s: {**s, "first.bias": torch.zeros(7)}, r"^of another shape first.bias \(7,\) instead of \(3,\)$"),
        (
            lambda s: {"first.long": s["first.bias"], **{k: v for k, v in s.items() if k != "first.bias"}},
            "^missing first.bias; unexpected first.long$",
        ),
    ],
)
def test_what_does_not_fit_is_said(change: Any, message: str) -> None:
    net = network()
    found = mismatch(net, change(net.state_dict()))
    assert re.search(message, found), found


def test_states_that_hold_more_than_tensors(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"scale": 2}

        def set_extra_state(self, state: object) -> None:
            pass

    net = Extra(1, 1)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    net.load_state_dict(load(tmp_path / "net.pt", net))
    assert mismatch(net, {"weight": torch.ones(2, 1)}).startswith(
        "missing bias; of another shape weight (2, 1) instead"
    )


def test_more_stages_in_the_file_or_in_the_network() -> None:
    few, many = (nn.Sequential(*[nn.Linear(1, 1) for _ in range(count)]) for count in (2, 4))
    assert mismatch(few, many.state_dict()).endswith("the file has more stages or layers than the network")
    assert mismatch(many, few.state_dict()).endswith("the network has more stages or layers than the file")
    inner = nn.Sequential(collections.OrderedDict(net=few))
    assert mismatch(inner, few.state_dict()).endswith("all names in the network have the prefix 'net.'")
