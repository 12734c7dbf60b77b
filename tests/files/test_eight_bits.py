"""Folders in eight bits: how close, how small, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conversions import relative, train_a_bit
from dun_zoo import Case
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.disk.eight_bits import pack, unpack
from lorun_adapt.disk.reading import Slot, parse_tensors
from lorun_adapt.files.save import update_cards

SLOTS = {"w": Slot((4, 64), torch.float32), "n": Slot((4, 64), torch.int8)}


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@torch.no_grad()
def test_close_on_every_network(case: Case, tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    with torch.enable_grad():
        train_a_bit(lorun, case.inputs)
    lorun.save_pretrained(tmp_path / "saved", dtype=torch.int8)
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", case.net)
    assert relative(loaded(*case.inputs), lorun(*case.inputs)) < 0.02
    for name, tensor in lorun.state_dict().items():
        error = (loaded.state_dict()[name] - tensor).abs().max()
        assert error <= tensor.abs().max() * (1 / 254 + 1 / 256) if tensor.is_floating_point() else error == 0, name
    assert loaded.fingerprint == lorun.fingerprint


class Wide(nn.Module):
    """Stages beside a sampling matrix and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.sampling = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("mask", torch.rand(64, 64))
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage(x).relu()
        return x @ self.sampling * self.mask


def test_small_and_nothing_outside_the_stages_is_rounded(tmp_path: Path) -> None:
    net = Wide()
    lorun = lorun_adapt.convert(net, rank=8)
    lorun.add_outside("default", "sampling")
    for dtype in (torch.float32, torch.float16, torch.int8):
        lorun.save_pretrained(tmp_path / str(dtype), dtype=dtype)
    half, eight = (bytes_of(tmp_path / str(dtype)) for dtype in (torch.float16, torch.int8))
    outside = 2 * 2 * 64 * 64 * 4
    assert eight - outside < 0.6 * (half - outside / 2)
    loaded = lorun_adapt.from_pretrained(tmp_path / "torch.int8", Wide())
    for name in ("sampling", "mask"):
        assert torch.equal(getattr(loaded.base, name), getattr(net, name))
    assert torch.equal(loaded.outside_of("default")["sampling"], net.sampling)
    stored = load_file(tmp_path / "torch.int8/base.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "sampling": torch.float32,
        "mask": torch.float32,
        "stages.0.0.bias": torch.float32,
        "stages.0.0.weight": torch.int8,
        ":scales": torch.bfloat16,
    }


def test_peft_refuses_and_the_card_says_why(tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(Wide(), rank=2)
    lorun.save_pretrained(tmp_path / "saved", dtype=torch.float16)
    stage = "adapters/default/stage_01"
    PeftModel.from_pretrained(lorun.base_denoiser(), tmp_path / "saved" / stage)
    lorun.save_pretrained(tmp_path / "saved", dtype=torch.int8)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(lorun.base_denoiser(), tmp_path / "saved" / stage)
    assert "stored in eight bits" in (tmp_path / "saved/README.md").read_text()
    lorun.load_adapter(tmp_path / "saved", "again")
    lorun.load_adapter(tmp_path / "saved" / stage, "one", stage=1)
    assert lorun.adapter_names == ["default", "again", "one"]
    update_cards(lorun_adapt.from_pretrained(tmp_path / "saved", Wide()).converted(), tmp_path / "saved")
    assert "stored in eight bits" in (tmp_path / "saved/README.md").read_text()


def test_largest_and_zero_values_are_kept() -> None:
    for largest in (1e-30, 1.0, 3e38):
        weight = torch.linspace(-1, 1, 64).repeat(4, 1) * largest
        weight[2] = 0
        stored = pack({"w": weight})
        again = unpack(stored, ["w"])["w"]
        assert again.isfinite().all() and not again[2].any() and stored["w"].abs().max() == 127
        assert (again - weight).abs().max() <= largest * (1 / 254 + 1 / 256)
        assert all(torch.equal(value, stored[name]) for name, value in pack({"w": again}).items())


def test_a_small_tensor_stays_as_it_is() -> None:
    for tensor in (torch.rand(64), torch.rand(2, 1).half(), torch.rand(0, 3), torch.ones(8, 8, dtype=torch.complex64)):
        stored = pack({"w": tensor, "v": torch.ones(9, 9)}, exact=["v"])
        assert list(stored) == ["w", "v"] and stored["w"] is tensor


def file_of(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A file of zeros."""
    header, size = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = size + torch.Size(shape).numel() * {"I8": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


W = N = ("I8", [4, 64])


def test_eight_bits_are_read_as_float32() -> None:
    tensors, _ = parse_tensors(file_of({"w": W, ":scales": ("BF16", [4]), "n": N}), SLOTS, "file")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"w": torch.float32, "n": torch.int8}


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": W},
        {":scales": ("BF16", [4])},
        {":scales": ("BF16", [0])},
        {"w": W, ":scales": ("BF16", [3])},
        {"w": W, ":scales": ("BF16", [4, 1])},
        {"w": W, ":scales": ("I8", [4])},
        {"w": ("F32", [4, 64]), ":scales": ("BF16", [4])},
        {"w": ("I8", [64, 4]), ":scales": ("BF16", [4])},
        {"w": ("I8", [256]), ":scales": ("BF16", [1])},
        {"n": N, ":scales": ("BF16", [4])},
    ],
)
def test_other_scales_are_refused(tensors: dict[str, tuple[str, list[int]]]) -> None:
    with pytest.raises(LoRunError, match="expected"):
        parse_tensors(file_of(tensors), SLOTS, "file")
