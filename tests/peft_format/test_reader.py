"""Adapters whose files are alike: after the first, they are read quickly."""

from __future__ import annotations

import shutil

import pytest
import torch
from dun_zoo import ZOO
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.peft_format.reader import Reader
from lorun_adapt.terms.term import Term


@pytest.fixture
def read_in_full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read in full."""
    seen: list[str] = []
    adapter = Reader.adapter
    monkeypatch.setattr(Reader, "adapter", lambda self, *args: seen.append(args[-1]) or adapter(self, *args))
    return seen


@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels", "attention"])
def test_the_second_set_is_read_quickly_and_is_the_same(name: str, read_in_full: list[str], tmp_path) -> None:
    """Layers with a bias too, whose files have it in two forms."""
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, rank=1)
    lorun.copy_adapter("default", "other")
    with torch.no_grad():
        for term in lorun.adapters["other"].modules():  # other biases may be stored in other forms
            for parameter in term.parameters() if isinstance(term, Term) else ():
                parameter.mul_(1.5)
    lorun.save_pretrained(tmp_path)
    fresh = lorun_adapt.from_pretrained(tmp_path, case.net)
    fresh.load_adapter(tmp_path / "adapters/default", "first")
    read_in_full.clear()
    fresh.load_adapter(tmp_path / "adapters/other", "second")
    assert not read_in_full
    for which, original in (("first", "default"), ("second", "other")):
        found, expected = (net.adapters[key].state_dict() for net, key in ((fresh, which), (lorun, original)))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_bias_that_overflows_is_refused(tmp_path) -> None:
    """Also in a file like one that was read before."""
    net = ZOO["list_of_blocks"]().net
    lorun = lorun_adapt.convert(net, LoraConfig(r=1, lora_alpha=1000))
    lorun.save_pretrained(tmp_path / "saved")
    refused = 0
    for stage in range(len(lorun.stage_map)):
        alone = tmp_path / f"alone_{stage}"
        shutil.copytree(tmp_path / f"saved/adapters/default/stage_{stage:02}", alone)  # without the hashes of the whole
        lorun.load_adapter(alone, "default", stage=stage)
        file = alone / "adapter_model.safetensors"
        tensors = load_file(file)
        read = [n for n in tensors if n.endswith("lora_B.bias") and n.replace("lora_B.bias", "bias") not in tensors]
        if read:
            tensors[read[0]] = torch.full_like(tensors[read[0]], 3e38)
            with safe_open(file, "pt") as stored:
                save_file(tensors, file, stored.metadata())
            with pytest.raises(LoRunError, match="NaN or Inf"):
                lorun.load_adapter(alone, "default", stage=stage)
            refused += 1
    assert refused


def test_ranks_above_the_limit_of_every_tensor_of_a_file(tmp_path) -> None:
    """The file holds all tensors of the denoiser, so that its layout could serve for others."""
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 1, 3, bias=False)) for _ in "ab"))
    lorun = lorun_adapt.convert(net, rank=1, stages="*")
    wide = get_peft_model(lorun.base_denoiser(), LoraConfig(r=12, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wide.save_pretrained(str(tmp_path))
    for _ in range(2):
        with pytest.warns(UserWarning, match="rank 12"):
            lorun.load_adapter(tmp_path, "default", stage=0)
        x = torch.rand(1, 1, 12, 12)
        with torch.no_grad():
            assert torch.allclose(lorun.network[0](x), wide(x), rtol=1e-4, atol=1e-4)
