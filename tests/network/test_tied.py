"""Parameters that the original network ties between stages of two groups, or to what stands outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conversions import relative
from dun_zoo import ZOO, Encoder, gradient_step
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.ConvTranspose2d(8, 1, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        return self.first(F.relu(self.second(code)))


class Tied(nn.Module):
    """Each decoder ends with the transpose of the first kernel of its encoder."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(Encoder() for _ in range(stages))
        self.decoders = nn.ModuleList(Decoder() for _ in range(stages))
        for encoder, decoder in zip(self.encoders, self.decoders):
            decoder.first.weight = encoder.first.weight

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for encoder, decoder in zip(self.encoders, self.decoders):
            x = gradient_step(x, y, mask, 0.5)
            x = x + 0.1 * decoder(encoder(x))
        return x


def test_recovery_trains_both_and_ends_with_what_it_scored() -> None:
    torch.manual_seed(0)
    net, inputs = Tied().eval(), ZOO["list_of_blocks"]().inputs
    expected = net(*inputs).detach()
    lorun = lorun_adapt.convert(net, rank=2)
    assert {"encoders.0.first.weight", "decoders.0.first.weight"} <= lorun.converted().trainable_names
    before = relative(lorun(*inputs), expected)
    lorun.recover(net, [inputs], steps=40)
    assert relative(lorun(*inputs), expected) < 0.5 * before


def test_merging_keeps_ties_or_says_that_it_cannot(tmp_path) -> None:
    torch.manual_seed(0)
    net, inputs = Tied().eval(), ZOO["list_of_blocks"]().inputs
    plain = lorun_adapt.convert(net, rank=1, share=False).merge_and_unload()
    assert plain.decoders[1].first.weight is plain.encoders[1].first.weight
    assert torch.equal(plain(*inputs), net(*inputs))
    lorun = lorun_adapt.convert(net, rank=2)
    lorun.recover(net, [inputs], steps=5)
    lorun.save_pretrained(tmp_path / "saved")
    for model in (lorun, lorun_adapt.from_pretrained(tmp_path / "saved", Tied())):
        with pytest.raises(LoRunError, match="cannot merge 'decoders.0.first.weight': the original network ties it to"):
            model.merge_and_unload()
