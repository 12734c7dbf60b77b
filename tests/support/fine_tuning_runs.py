"""A small conversion to fine-tune, its noisy measurements, and losses."""

from __future__ import annotations

import os
import signal

import torch
from dun_zoo import Block, Denoiser, ListOfBlocks
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunModel
from lorun_adapt.training.distill import Loss


def converted() -> tuple[LoRunModel, nn.Module]:
    torch.manual_seed(0)
    net = ListOfBlocks([Block(Denoiser()) for _ in range(3)]).eval()
    return lorun_adapt.convert(net, rank=2), net


def levels(*sigmas: float) -> LoRunModel:
    """A set for each sigma, each a bit farther from the first."""
    lorun, _ = converted()
    for i, sigma in enumerate(sigmas):
        lorun.copy_adapter("default", f"sigma{sigma:g}")
        lorun.set_noise(f"sigma{sigma:g}", sigma=sigma)
        with torch.no_grad():
            for parameter in lorun.adapters[f"sigma{sigma:g}"].parameters():
                parameter.mul_(1 + i)
    return lorun


def noisy(count: int = 8, seed: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Measurements with noise, masks, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.3).float()
    found = []
    for _ in range(count):
        truth = torch.rand(4, 1, 1, 1, generator=generator).expand(4, 1, 8, 8)
        found.append((mask * (truth + 0.3 * torch.randn(truth.shape, generator=generator)), mask, truth))
    return found


def to_truth(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return (output - batch[2]).square().mean()


def to_half(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return (output - 0.5).square().mean()


def error(lorun: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(to_truth(lorun(y, mask), (y, mask, truth))) for y, mask, truth in batches) / len(batches)


def frozen(lorun: LoRunModel) -> dict[str, Tensor]:
    """All but the new set."""
    return {name: tensor.clone() for name, tensor in lorun.state_dict().items() if ".new." not in f".{name}."}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopping() -> Loss:
    """A loss that presses Ctrl-C when it is called the 20th time."""
    seen: list[int] = []

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        seen.append(1)
        if len(seen) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return to_truth(output, batch)

    return loss
