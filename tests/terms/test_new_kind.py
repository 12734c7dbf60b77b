"""A new kind of term is one class and one line in the registry: this one scales the base's output channels."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import ZOO
from peft import LoraConfig, PeftModel
from torch import nn

import lorun_adapt
from lorun_adapt.disk.reading import Slot
from lorun_adapt.terms.registry import TERMS
from lorun_adapt.terms.term import Fitted, Term


class ChannelScale(Term):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, base):
        return base * (1 + self.scale.reshape(-1, *[1] * (base.ndim - 1)))

    @classmethod
    def fit(cls, stages, spec, setting, *, weighting=None, generator=None):
        base, flat = stages.mean(0), stages.flatten(2)
        scales = (flat * base.flatten(1)).sum(2) / base.flatten(1).square().sum(1) - 1
        terms = [cls(scale.clone()) for scale in scales]
        return Fitted(base, terms, torch.stack([(w - t(base)).square().sum() for w, t in zip(stages, terms)]).detach())

    untrained = classmethod(lambda cls, spec, setting, like, generator: cls(torch.zeros(spec.shape[0]).to(like)))
    weighted_sum = classmethod(lambda cls, terms, w: cls(sum(x * t.scale.detach() for x, t in zip(w, terms))))
    size = classmethod(lambda cls, spec, rank: spec.shape[0])
    file_slots = classmethod(lambda cls, spec: {"scale": Slot((spec.shape[0],), spec.dtype)})


class ChannelScaleConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "CHANNEL_SCALE"


def test_convert_swap_save_load_sum_and_merge(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "CHANNEL_SCALE", ChannelScale)
    net, y = (case := ZOO["list_of_blocks"]()).net, case.inputs
    lorun = lorun_adapt.convert(net, ChannelScaleConfig())
    assert {type(m) for m in lorun.adapters.modules() if isinstance(m, Term)} == {ChannelScale}
    lorun.copy_adapter("default", "other")
    nn.init.normal_(lorun.adapters["other"]["stage_01"]["denoiser"]._modules["denoiser/body/weight"].scale)
    before, _ = lorun(*y), lorun.set_adapter("other")
    assert not torch.equal(lorun(*y), before)
    assert torch.allclose(lorun.merge_and_unload()(*y), lorun(*y), atol=1e-6)
    lorun.add_weighted_adapter(["default", "other"], [0.0, 1.0], "sum")
    assert torch.allclose(lorun(*y), (lorun.set_adapter("sum"), lorun(*y))[1], atol=1e-6)
    lorun.save_pretrained(tmp_path / "saved")
    assert torch.equal(lorun_adapt.from_pretrained(tmp_path / "saved", net)(*y), lorun(*y))
    assert "adapted by a ChannelScale, which PEFT cannot represent" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(ValueError, match="Target modules"):
        PeftModel.from_pretrained(lorun.base_denoiser(), str(tmp_path / "saved/adapters/other/stage_01"))
