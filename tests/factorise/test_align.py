"""Hidden channels of the stages brought into one order."""

from __future__ import annotations

import warnings

import pytest
import torch
from conversions import relative
from dun_zoo import ZOO, Block, Denoiser, ListOfBlocks, ListOfDenoisers, dncnn
from peft import LoraConfig
from torch import nn

import lorun_adapt
from lorun_adapt import convert
from lorun_adapt.factorise.align import align, hidden_channels
from lorun_adapt.terms.factors import factorise
from lorun_adapt.terms.lowrank import LowRank
from lorun_adapt.terms.term import Setting


def shuffled(denoiser: nn.Module) -> nn.Module:
    """The same function with its hidden channels in another order."""
    import copy

    twin = copy.deepcopy(denoiser)
    first, second = torch.randperm(8), torch.randperm(8)
    twin.head.weight.data, twin.head.bias.data = denoiser.head.weight[first].data, denoiser.head.bias[first].data
    twin.body.weight.data = denoiser.body.weight[second][:, first].data
    twin.body.bias.data = denoiser.body.bias[second].data
    twin.tail.weight.data = denoiser.tail.weight[:, second].data
    return twin


def test_where_channels_can_be_permuted() -> None:
    places = [(place.rows, place.columns) for place in hidden_channels(Denoiser())]
    assert places == [(("head.weight", "head.bias"), "body.weight"), (("body.weight", "body.bias"), "tail.weight")]
    places = hidden_channels(dncnn(8, 4))
    assert "layers.3.running_mean" in places[1].rows and places[1].columns == "layers.5.weight"
    raw = hidden_channels(ZOO["list_of_raw_kernels"]().net.blocks[0])
    assert [(place.rows, place.columns) for place in raw] == [(("analysis",), "inner"), (("inner",), "outer")]


def test_skips_and_shared_layers_are_left_alone() -> None:
    class Skip(Denoiser):
        def forward(self, x):
            hidden = torch.relu(self.head(x))
            return self.tail(torch.relu(self.body(hidden)) + hidden)

    assert hidden_channels(Skip()) == []


class SometimesSkips(Denoiser):
    """One class, but a flag decides whether hidden channels meet others on the way."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x):
        hidden = torch.relu(self.head(x))
        inner = torch.relu(self.body(hidden))
        return self.tail(inner + hidden if self.skip else inner)


class TracedInPartOnly(Denoiser):
    """The sequence by itself would allow what the features taken from within it forbid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.head, nn.ReLU(), self.body, nn.ReLU())

    def forward(self, x):
        if x.shape[-1] % 2:
            raise ValueError
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.tail(features[1] * features[3])


@pytest.mark.parametrize(
    "denoisers", [[SometimesSkips(k > 0) for k in range(4)], [TracedInPartOnly() for _ in range(4)]]
)
def test_aligning_never_changes_the_function(denoisers) -> None:
    net = ListOfDenoisers(denoisers)
    inputs = ZOO["list_of_denoisers"]().inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorun = convert(net, LoraConfig(r=7, target_modules=["body", "2"]), example_inputs=inputs)
    assert 0 < lorun.report().relative_error < 0.3
    merged = lorun.merge_and_unload()
    for plain, original in zip(merged.denoisers, net.denoisers):  # private tensors tell whether channels moved
        assert torch.equal(plain.tail.weight, original.tail.weight)
        assert torch.equal(plain.head.weight, original.head.weight)
    assert relative(lorun(*inputs), net(*inputs)) < 0.3


def test_permuted_copies_become_one() -> None:
    denoiser = Denoiser()
    net = ListOfDenoisers([shuffled(denoiser) for _ in range(4)])
    inputs = ZOO["list_of_denoisers"]().inputs
    assert convert(net, rank=1).report().relative_error > 0.1  # without inputs, nothing proves that it is the same
    lorun = convert(net, rank=1, example_inputs=inputs)
    assert lorun.report().relative_error < 1e-6
    assert relative(lorun(*inputs), net(*inputs)) < 1e-5


def test_aligning_never_raises_the_error() -> None:
    net = ListOfBlocks([Block(Denoiser(12)) for _ in range(5)])
    group = lorun_adapt.find_stages(net).groups[0]
    stacks = {spec.name: torch.stack([b.get_parameter(spec.name).data for b in net.blocks]) for spec in group.tensors}
    ranks = {"denoiser.body.weight": 3, "denoiser.head.weight": 2}
    settings = {name: Setting(rank) for name, rank in ranks.items()}
    moved = align(group, list(net.blocks), stacks, settings, LowRank)

    def total(held):
        return sum(float(factorise(held[n].flatten(2), r).error.sum()) for n, r in ranks.items())

    assert total(moved) <= total(stacks)


class InAnAttribute(Denoiser):
    def forward(self, x):
        self.seen = torch.relu(self.head(x))
        return x + 0.1 * self.tail(torch.relu(self.body(self.seen)))


class SometimesWithout(Denoiser):
    """``torch.fx`` never sees a None: it traces the other branch."""

    def forward(self, x, seen=None):
        hidden = torch.relu(self.head(x))
        self.seen = hidden if seen is None else seen
        return x + 0.1 * self.tail(torch.relu(self.body(hidden)))


class ByAnotherMethod(Denoiser):
    def encode(self, x):
        return torch.relu(self.head(x))


class ReadsChannels(nn.Module):
    """Mixes what it sees of the channels within its stages into the image."""

    def __init__(self, denoisers: list[nn.Module], hooked: bool = False) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(denoisers)
        self.mix = nn.Conv2d(8, 1, 1)
        self.seen: list[torch.Tensor] = []
        if hooked:
            for denoiser in denoisers:
                denoiser.head.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

    def forward(self, y, mask):
        x = y
        for denoiser in self.denoisers:
            x = denoiser(x - 0.5 * mask * (mask * x - y))
            if isinstance(denoiser, ByAnotherMethod):
                hidden = denoiser.encode(x)
            else:
                hidden = self.seen.pop() if self.seen else denoiser.seen
            x = x + 0.1 * self.mix(hidden)
        return x


@pytest.mark.parametrize("kind", [InAnAttribute, SometimesWithout, ByAnotherMethod, Denoiser])
@pytest.mark.parametrize("seed", range(3))
def test_channels_that_others_see_stay_in_their_order(kind, seed) -> None:
    torch.manual_seed(seed)
    net = ReadsChannels([kind() for _ in range(4)], hooked=kind is Denoiser).eval()
    inputs = ZOO["list_of_denoisers"]().inputs
    expected = net(*inputs)
    tensors = ["head.weight", "body.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in ({"example_inputs": inputs}, {}):
            lorun = convert(net, LoraConfig(r=100, lora_alpha=100, target_parameters=tensors), **given)
            assert relative(lorun(*inputs), expected) < 1e-5
            assert relative(lorun.merge_and_unload()(*inputs), expected) < 1e-5
