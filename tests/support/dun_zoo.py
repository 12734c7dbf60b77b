"""Small networks of the shapes in which published unfolding networks hold their stages.

Each entry of ``ZOO`` is a function that returns a ``Case``. All restore images of 8x8 pixels from
masked ones by a gradient step and a denoiser a stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


@dataclass
class Case:
    net: nn.Module
    sites: list[list[str]]  # for each group, the modules of its stages in order
    run_to_find: bool = False  # a loop shows only when the network runs
    exact: bool = False  # one module for all stages: converted at any rank, it is the original
    alone: bool = True  # a stage can run by itself on what it was given
    inputs: tuple[Any, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        self.net.eval()
        if not self.inputs:
            generator = torch.Generator().manual_seed(1)
            image = torch.rand(2, 1, 8, 8, generator=generator)
            mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
            self.inputs = (image * mask, mask)

    def find(self) -> dict[str, Any]:
        return {"example_inputs": self.inputs} if self.run_to_find else {}


ZOO: dict[str, Callable[[], Case]] = {}


def entry(function: Callable[[], Case]) -> Callable[[], Case]:
    def build() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return function()

    ZOO[function.__name__] = build
    return build


def gradient_step(x: Tensor, y: Tensor, mask: Tensor, step: Tensor | float) -> Tensor:
    return x - step * mask * (mask * x - y)


# --- denoisers -----------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """conv, ReLU, conv, ReLU, conv, with a residual."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.tail(F.relu(self.body(F.relu(self.head(x)))))


class RawKernels(nn.Module):
    """No layer at all: kernels are parameters of their own, as in ISTA-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.5))
        self.threshold = nn.Parameter(torch.tensor(0.01))
        self.analysis = nn.Parameter(torch.randn(WIDTH, 1, 3, 3) * 0.3)
        self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) * 0.1)
        self.outer = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) * 0.1)
        self.synthesis = nn.Parameter(torch.randn(1, WIDTH, 3, 3) * 0.1)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = gradient_step(x, y, mask, self.step)
        code = F.conv2d(x, self.analysis, padding=1)
        code = F.conv2d(F.relu(F.conv2d(code, self.inner, padding=1)), self.outer, padding=1)
        code = code.sign() * F.relu(code.abs() - self.threshold)
        return x + F.conv2d(code, self.synthesis, padding=1)


class Layers(nn.Module):
    """A residual around any layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.layers(x)


class Attention(nn.Module):
    """Tokens are image rows; a learned position embedding of shape (1, 1, heads, n, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.position = nn.Parameter(torch.randn(1, 1, 2, 8, 8) * 0.1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x[:, 0])
        bias = self.position[0, 0].repeat(len(tokens), 1, 1)
        mixed, _ = self.attend(tokens, tokens, tokens, attn_mask=bias, need_weights=False)
        return x + 0.1 * self.mlp(mixed)[:, None]


def dncnn(width: int = WIDTH, depth: int = 12) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True)]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    net = Layers(*layers, nn.Conv2d(width, 1, 3, padding=1))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


# --- networks ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.rand(()))
        self.denoiser = denoiser

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.denoiser(gradient_step(x, y, mask, self.step))


class ListOfBlocks(nn.Module):
    """Shape 1: a list of blocks, gradient step inside (ISTA-Net+, OPINE-Net+)."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for block in self.blocks:
            x = block(x, y, mask)
        return x


class ListOfDenoisers(nn.Module):
    """Shape 2: denoisers in a list, steps beside it (DAUHST)."""

    def __init__(self, denoisers: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.rand(len(denoisers)))
        self.condition = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
        self.denoisers = nn.ModuleList(denoisers)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y * torch.sigmoid(self.condition(mask.mean().reshape(1, 1)))
        for step, denoiser in zip(self.steps, self.denoisers):
            x = denoiser(gradient_step(x, y, mask, step))
        return x


class NumberedAttributes(nn.Module):
    """Shape 3: numbered attributes, and a plain list of the same modules that the forward uses (AMP-Net)."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        self.denoisers = []
        for stage in range(1, stages + 1):
            denoiser = Denoiser()
            setattr(self, f"denoiser_{stage}", denoiser)
            self.denoisers.append(denoiser)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for denoiser in self.denoisers:
            x = denoiser(gradient_step(x, y, mask, 0.5))
        return x


class HeadBodyTail(nn.Module):
    """Shape 4: one class under three attributes (RDLUF-MixS2); with ``loops`` the body is called so often."""

    def __init__(self, loops: int = 0) -> None:
        super().__init__()
        self.head = Denoiser()
        self.body = Denoiser() if loops else nn.ModuleList([Denoiser() for _ in range(3)])
        self.tail = Denoiser()
        self.loops = loops

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for denoiser in (self.head, *([self.body] * self.loops if self.loops else self.body), self.tail):
            x = denoiser(gradient_step(x, y, mask, 0.5))
        return x


class Encoder(nn.Module):
    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class EncoderDecoder(nn.Module):
    """Shape 5: two modules a stage under numbered attributes; the first encoder is another (DGUNet)."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        self.stages = stages
        for stage in range(1, stages + 1):
            setattr(self, f"stage{stage}_encoder", Encoder(1 if stage > 1 else 2))
            setattr(self, f"stage{stage}_decoder", Decoder())

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for stage in range(1, self.stages + 1):
            x = gradient_step(x, y, mask, 0.5)
            inputs = x if stage > 1 else torch.cat([x, mask.expand_as(x)], 1)
            code = getattr(self, f"stage{stage}_encoder")(inputs)
            x = x + 0.1 * getattr(self, f"stage{stage}_decoder")(code)
        return x


class PairBlocks(nn.Module):
    """Shape 5 inside blocks that differ elsewhere (PADUT): equal encoders and decoders, unequal heads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for stage in range(3):
            block = nn.Module()
            block.encoder, block.decoder = Encoder(), Decoder()
            block.gate = nn.Linear(1, stage + 1)
            self.blocks.append(block)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for block in self.blocks:
            x = gradient_step(x, y, mask, 0.5)
            gate = block.gate(mask.mean().reshape(1, 1)).mean()
            x = x + 0.1 * gate * block.decoder(block.encoder(x))
        return x


class Looped(nn.Module):
    """Shape 6: one module called in a loop (MoDL, USRNet)."""

    def __init__(self, loops: int = 4, recompute: bool | None = None) -> None:
        super().__init__()
        self.p = Denoiser()
        self.loops = loops
        self.recompute = recompute  # use_reentrant of torch.utils.checkpoint; None: no checkpoint

    def iterate(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.p(gradient_step(x, y, mask, 0.5))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for _ in range(self.loops):
            if self.recompute is None:
                x = self.iterate(x, y, mask)
            else:
                x = checkpoint(self.iterate, x, y, mask, use_reentrant=self.recompute)
        return x


class EndsAroundALoop(nn.Module):
    """Shapes 5 and 6: other first and last stages, one between them called in a loop (DGUNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Denoiser(6)
        self.basic = Denoiser()
        self.last = Denoiser(4)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = self.first(y)
        for _ in range(3):
            x = self.basic(gradient_step(x, y, mask, 0.5))
        return self.last(x)


class Remembering(nn.Module):
    """Functions that remember the network, and parameters in a plain list (AMP-Net, TransCS, D3C2-Net)."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(stages))
        for stage in range(stages):
            setattr(self, f"step_{stage}", nn.Parameter(torch.rand(())))
        self.steps = [getattr(self, f"step_{stage}") for stage in range(stages)]
        self.kernel = nn.Parameter(torch.rand(1, 1, 3, 3) / 9)
        self.register_buffer("gain", torch.rand(()))
        kernel, blur = self.kernel, lambda x: F.conv2d(x, self.kernel, padding=1)
        self.operator = {
            "forward": lambda x, mask: mask * blur(x),
            "back": [partial(F.conv_transpose2d, weight=kernel, padding=1)],
            "gain": lambda x, gain=self.gain: gain * x,
        }
        self.apply_stage = self._apply_stage

    def _apply_stage(self, x: Tensor, y: Tensor, mask: Tensor, stage: int) -> Tensor:
        residual = mask * (self.operator["forward"](x, mask) - y)
        return self.denoisers[stage](x - self.steps[stage] * self.operator["back"][0](residual))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = self.operator["gain"](y)
        for stage in range(len(self.denoisers)):
            x = self.apply_stage(x, y, mask, stage)
        return x


class Alternating(nn.Module):
    """Two kinds that take turns in one list, of which one holds the other, too (SSR)."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(stages):
            self.blocks += [Block(Denoiser()), Denoiser()]

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for block, denoiser in zip(self.blocks[::2], self.blocks[1::2]):
            x = denoiser(gradient_step(block(x, y, mask), y, mask, 0.5))
        return x


class Sequentials(nn.Module):
    """Two Sequentials that serve as lists (KXNet)."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(*[Block(Denoiser()) for _ in range(stages)])
        self.second = nn.Sequential(*[RawKernels() for _ in range(stages)])

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for first, second in zip(self.first, self.second):
            x = second(first(x, y, mask), y, mask)
        return x


class Twice(nn.Module):
    """Denoisers in a list of their own and in the stages, which have numbered names and a list (PnP codes)."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(stages))
        for stage, denoiser in enumerate(self.denoisers):
            setattr(self, f"stage{stage}", Block(denoiser))
        self.stages = nn.ModuleList(getattr(self, f"stage{stage}") for stage in range(stages))
        self.average = copy.deepcopy(self.stages)  # of the weights, never run

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for stage in self.stages:
            x = stage(x, y, mask)
        return x


class Memory(nn.Module):
    """Stages that read and lengthen a list (MADUN), and a dict that holds what they iterate (ADMM-Net)."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Remembers() for _ in range(stages))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": y, "u": torch.zeros_like(y), "memory": []}
        for stage in self.stages:
            stage(state, y, mask)
        return state["x"]


class Remembers(Block):
    def __init__(self) -> None:
        super().__init__(Denoiser())

    def forward(self, state: dict[str, Any], y: Tensor, mask: Tensor) -> None:  # type: ignore[override]
        before = sum(state["memory"][-2:]) / 10 if state["memory"] else 0
        x = self.denoiser(gradient_step(state["x"] + state["u"] + before, y, mask, self.step))
        state["memory"].append(torch.tanh(x))
        state["u"] = state["u"] + 0.1 * (x - state["x"])
        state["x"] = x


@entry
def twice() -> Case:
    return Case(Twice(), [[f"stage{k}" for k in range(3)]], run_to_find=True)


@entry
def memory() -> Case:
    return Case(Memory(), [[f"stages.{k}" for k in range(3)]], alone=False)


@entry
def shared_denoiser_with_a_handle() -> Case:
    net = ListOfBlocks([Block(Denoiser()) for _ in range(1)])
    net.denoiser = net.blocks[0].denoiser
    net.blocks.extend(Block(net.denoiser) for _ in range(3))
    return Case(net, [[f"blocks.{k}" for k in range(4)]], run_to_find=True)


@entry
def alternating() -> Case:
    return Case(Alternating(), [[f"blocks.{k}" for k in range(first, 6, 2)] for first in (0, 1)])


@entry
def sequentials() -> Case:
    return Case(Sequentials(), [[f"{name}.{k}" for k in range(3)] for name in ("first", "second")])


@entry
def remembering() -> Case:
    return Case(Remembering(), [[f"denoisers.{k}" for k in range(3)]])


@entry
def list_of_blocks() -> Case:
    return Case(ListOfBlocks([Block(Denoiser()) for _ in range(4)]), [[f"blocks.{k}" for k in range(4)]])


@entry
def list_of_raw_kernels() -> Case:
    return Case(ListOfBlocks([RawKernels() for _ in range(4)]), [[f"blocks.{k}" for k in range(4)]])


def _denoisers(make: Callable[[], nn.Module]) -> Case:
    return Case(ListOfDenoisers([make() for _ in range(3)]), [[f"denoisers.{k}" for k in range(3)]])


@entry
def list_of_denoisers() -> Case:
    return _denoisers(Denoiser)


@entry
def list_of_dncnns() -> Case:
    return _denoisers(dncnn)


@entry
def attention() -> Case:
    return _denoisers(Attention)


def _middle(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Layers(nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(), layer(), nn.ReLU(), nn.Conv2d(WIDTH, 1, 1))


@entry
def depthwise() -> Case:
    return _denoisers(_middle(lambda: nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)))


@entry
def grouped() -> Case:
    return _denoisers(_middle(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)))


@entry
def dilated() -> Case:
    return _denoisers(_middle(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2)))


@entry
def reflect_padded() -> Case:
    return _denoisers(_middle(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")))


@entry
def transposed() -> Case:
    return _denoisers(_middle(lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1)))


@entry
def numbered_attributes() -> Case:
    return Case(NumberedAttributes(), [[f"denoiser_{k}" for k in range(1, 5)]])


@entry
def head_body_tail() -> Case:
    return Case(HeadBodyTail(), [["head", "body.0", "body.1", "body.2", "tail"]])


@entry
def encoder_decoder() -> Case:
    return Case(
        EncoderDecoder(), [[f"stage{k}_decoder" for k in range(1, 5)], [f"stage{k}_encoder" for k in range(2, 5)]]
    )


@entry
def pair_blocks() -> Case:
    return Case(PairBlocks(), [[f"blocks.{k}.encoder" for k in range(3)], [f"blocks.{k}.decoder" for k in range(3)]])


@entry
def looped() -> Case:
    return Case(Looped(), [["p"] * 4], run_to_find=True, exact=True)


@entry
def ends_around_a_loop() -> Case:
    return Case(EndsAroundALoop(), [["basic"] * 3], run_to_find=True, exact=True)


@entry
def many_parents() -> Case:
    denoiser = Denoiser()
    return Case(ListOfBlocks([Block(denoiser) for _ in range(4)]), [[f"blocks.{k}" for k in range(4)]])


@entry
def one_block_many_times() -> Case:
    return Case(ListOfBlocks([Block(Denoiser())] * 4), [[f"blocks.{k}" for k in range(4)]], exact=True)


@entry
def shared_body() -> Case:
    return Case(HeadBodyTail(loops=3), [["head", "body", "body", "body", "tail"]], run_to_find=True)
