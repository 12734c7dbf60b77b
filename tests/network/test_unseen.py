"""Networks whose code gets at the weights of their stages without reading them as attributes."""

from __future__ import annotations

import warnings

import pytest
import torch
from conversions import relative
from dun_zoo import ZOO, Block, Denoiser, ListOfBlocks
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.util.toy import ToyUnfoldingNet


class Scaled(Block):
    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        scaled = {name: 1.5 * p for name, p in self.denoiser.named_parameters()}
        return functional_call(self.denoiser, scaled, (x - self.step * mask * (mask * x - y),))


class Penalised(Block):
    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, y, mask) * (1 + 0.1 * sum(p.square().sum() for p in self.denoiser.parameters()))


class ExactType(Block):
    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        z = x = x - self.step * mask * (mask * x - y)
        for layer in self.denoiser.children():
            z = torch.relu(layer(z)) if type(layer) is nn.Conv2d else z
        return x + 0.1 * z.mean(1, keepdim=True)


class Dictionary(Block):
    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, y, mask) + self.denoiser.body._parameters["weight"].mean()


@pytest.mark.parametrize("block", [Scaled, Penalised, ExactType, Dictionary])
def test_they_are_refused_if_there_are_inputs(block: type[Block]) -> None:
    torch.manual_seed(0)
    net, inputs = ListOfBlocks([block(Denoiser()) for _ in range(3)]).eval(), ZOO["list_of_blocks"]().inputs
    names = [f"denoiser.{layer}.weight" for layer in ("head", "body", "tail")]
    config = LoraConfig(r=100, lora_alpha=100, target_parameters=names)
    with (
        warnings.catch_warnings(),
        pytest.raises(LoRunError, match="computes something else with adapters|cannot run with"),
    ):
        warnings.simplefilter("ignore")
        lorun_adapt.convert(net, config, example_inputs=inputs)
    assert relative(net(*inputs), net(*inputs)) == 0


def test_they_are_refused_where_stages_keep_their_weights_too() -> None:
    torch.manual_seed(0)
    net = ListOfBlocks([ExactType(Denoiser()) for _ in range(3)]).eval()
    with pytest.raises(LoRunError, match="computes something else with adapters|cannot run with adapters"):
        lorun_adapt.convert(net, rank=1, share=False, example_inputs=ZOO["list_of_blocks"]().inputs)


class Kept(Block):
    """Normalises its first kernel once; ``how`` says how it notices that this is still to be done."""

    how = "none"

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        if self.how != "absent":
            self.kernel = None
        self.window: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        if self.window is None:  # depends on the image alone
            self.window = torch.ones_like(x)
        weight = self.denoiser.head.weight
        if self.how == "always" or getattr(self, "kernel", None) is None:
            self.kernel = weight / weight.norm()
        z = nn.functional.conv2d(x * self.window, self.kernel.detach(), padding=1).mean(1, keepdim=True)
        return super().forward(x + 0.1 * z, y, mask)


@pytest.mark.parametrize("how", ["none", "absent", "always"])
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_what_stages_keep_of_their_weights(how: str, has_run: bool, share: bool, monkeypatch) -> None:
    monkeypatch.setattr(Kept, "how", how)
    torch.manual_seed(0)
    net, inputs = ListOfBlocks([Kept(Denoiser()) for _ in range(3)]).eval(), ZOO["list_of_blocks"]().inputs
    if has_run:
        net(*inputs)
    before = [dict(vars(block)) for block in net.blocks]
    if how == "always":
        lorun_adapt.convert(net, rank=1, share=share, example_inputs=inputs)
    else:
        with pytest.raises(LoRunError, match="the Kept of ListOfBlocks keeps kernel, computed from its weights, from"):
            lorun_adapt.convert(net, rank=1, share=share, example_inputs=inputs)
    assert all(vars(block).get(name) is value for block, was in zip(net.blocks, before) for name, value in was.items())


def test_a_weak_reference_to_the_network_follows_the_copy() -> None:
    import weakref

    class Child(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, *self.network().measured)

    class Parent(ListOfBlocks):
        def forward(self, y: Tensor, mask: Tensor) -> Tensor:
            self.measured, x = (y, mask), y
            for block in self.blocks:
                x = block(x)
            return x

    net = Parent([Child(Denoiser()) for _ in range(3)]).eval()
    for block in net.blocks:
        block.network = weakref.ref(net)
    first, second = ZOO["list_of_blocks"]().inputs, (torch.rand(2, 1, 8, 8), torch.ones(1, 1, 8, 8))
    net(*first)
    lorun = lorun_adapt.convert(net, rank=2, share=False)
    expected = net(*second)
    net(*first)
    assert torch.equal(lorun(*second), expected)


def test_a_class_without_subclasses_is_named() -> None:
    class Final(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8, 8))

        def __init_subclass__(cls, kind: str) -> None:
            super().__init_subclass__()

    net = ListOfBlocks([Block(Final()) for _ in range(3)])
    with pytest.raises(LoRunError, match="Final allows no subclass .*kind.*, which adapters need"):
        lorun_adapt.convert(net, LoraConfig(r=1, target_parameters=["denoiser.scale"]))


class WideStage(nn.Module):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.head, self.body, self.tail = (
            nn.Parameter(0.1 * torch.randn(shape)) for shape in ((32, 1, 3, 3), (32, 32, 3, 3), (1, 32, 3, 3))
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.conv2d(x, self.head, padding=1))
        body = torch.vmap(lambda row: row / (1 + row.norm()))(self.body) if self.normalised else self.body
        hidden = nn.functional.conv2d(hidden, body, padding=1)
        return x + nn.functional.conv2d(torch.relu(hidden), self.tail, padding=1) + 0.1 * (y - x)


class Wide(ToyUnfoldingNet):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(WideStage(normalised) for _ in range(3))


def test_code_that_no_factors_reach_is_refused() -> None:
    torch.manual_seed(0)
    inputs = (torch.rand(1, 1, 8, 8),)
    plain = lorun_adapt.convert(Wide(normalised=False), budget=0.15, example_inputs=inputs)
    assert plain.report().num_without_base and plain(*inputs).isfinite().all()
    with pytest.raises(LoRunError, match="code that cannot use tensors without a base, .*: give rank=, so"):
        lorun_adapt.convert(Wide(normalised=True), budget=0.15, example_inputs=inputs)
