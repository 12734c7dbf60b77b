"""Measure how long a conversion takes, what low-rank terms cost at inference, and how fast adapter sets are swapped.

    python examples/benchmark.py

Times are medians of runs that alternate between the original and the converted network. Only their ratios carry over
to another machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from lorun_adapt import LoRunModel, convert


class Stage(nn.Module):
    """An ISTA iteration as in the reference network, for masked images of any size, with any number of layers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(1.0))
        self.threshold = nn.Parameter(torch.tensor(0.01))
        self.conv_d = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.forward_transform, self.backward_transform = _transform(width, layers), _transform(width, layers)
        self.conv_g = nn.Conv2d(width, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        r = x - self.step * mask * (mask * x - y)
        code = self.forward_transform(self.conv_d(r))
        code = code.sign() * F.relu(code.abs() - self.threshold)
        return r + self.conv_g(self.backward_transform(code))


def _transform(width: int, layers: int) -> nn.Module:
    inner: list[nn.Module] = []
    for _ in range(layers):
        inner += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*inner[:-1])


class Unfolded(nn.Module):
    def __init__(self, width: int, layers: int, stages: int = 9) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(width, layers) for _ in range(stages))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for stage in self.stages:
            x = stage(x, y, mask)
        return x


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, run in turns after one warm-up round."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, seconds in zip(functions, times):
            start = time.perf_counter()
            function()
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def time_swaps(repeats: int) -> None:
    """Sets for five convolutions in each of nine stages, which PEFT can represent, in memory and from disk."""
    lorun = convert(Unfolded(64, 5).eval(), stages="stages.*.forward_transform")
    mask = torch.ones(1, 1, 64, 64)
    y = torch.rand(1, 1, 64, 64)
    with tempfile.TemporaryDirectory() as scratch:
        lorun.save_pretrained(scratch)
        folder = Path(scratch, "adapters", "default")
        for name in ("a", "b", "from_disk"):
            lorun.load_adapter(folder, name)
        sets = itertools.cycle(["a", "b"])
        choices = itertools.cycle([{stage: "ab"[(stage + turn) % 2] for stage in range(9)} for turn in range(2)])
        denoiser = PeftModel.from_pretrained(lorun.base_denoiser(), folder / "stage_00", adapter_name="first")

        def load_into_peft() -> None:
            for stage in range(9):
                denoiser.load_adapter(folder / f"stage_{stage:02d}", f"stage_{stage}")

        with torch.inference_mode():
            forward, one, each, disk, peft = medians(
                [
                    partial(lorun, y, mask),
                    lambda: lorun.set_adapter(next(sets)),
                    lambda: lorun.set_adapter(next(choices)),
                    lambda: lorun.load_adapter(folder, "from_disk"),
                    load_into_peft,
                ],
                repeats,
            )
    print(f"setting a set in nine stages: {1000 * one:.2f} ms, {one / forward:.3f} times a forward at 64x64")
    print(f"setting a choice by stage: {1000 * each:.2f} ms, {each / forward:.3f} times a forward at 64x64")
    print(f"a set of nine stages from disk: {1000 * disk:.1f} ms, {disk / peft:.3f} times PEFT's load_adapter")


def measured(size: int) -> tuple[Tensor, Tensor]:
    """A masked image, and the mask."""
    mask = (torch.rand(1, 1, size, size) > 0.5).float()
    return mask * torch.rand(1, 1, size, size), mask


def without_bases(net: Unfolded, width: int, rank: int) -> LoRunModel:
    """The network in the parameters that low-rank kernels of this rank have, which leave none for bases."""
    kernels = sum(p.numel() for p in net.parameters() if p.dim() == 4 and p.shape[0] == p.shape[1])
    everything, stages = sum(p.numel() for p in net.parameters()), len(net.stages)
    private = (everything - kernels) * (stages + 1) // stages  # the base has one of each, too
    return convert(net, budget=private + stages * 4 * rank * 10 * width).eval()


def time_without_bases(width: int, rank: int, size: int, repeats: int) -> None:
    """A network whose kernels have no base, as a budget chooses for stages that have nothing in common."""
    net = Unfolded(width, 2).eval()
    lorun = without_bases(net, width, rank)
    ranks = [rank for group in lorun.stage_map.ranks.values() for rank in group.values()]
    y, mask = measured(size)

    def step(model: nn.Module) -> None:
        model(y, mask).square().mean().backward()

    with torch.inference_mode():
        plain, ours = medians([partial(net, y, mask), partial(lorun, y, mask)], repeats)
    plain_step, our_step = medians([partial(step, net), partial(step, lorun)], repeats)
    print(
        f"no base in {lorun.report().num_without_base} of {len(ranks)} kernels, {width} channels, ranks "
        f"{min(ranks)} to {max(ranks)}, {size}x{size}: inference {ours / plain:.3f}, training step "
        f"{our_step / plain_step:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)

    time_swaps(args.repeats)
    net = Unfolded(64, 9)
    (seconds,) = medians([lambda: convert(net)], 3)
    print(f"conversion of {sum(p.numel() for p in net.parameters()):,} parameters: {seconds:.2f} s")

    net = Unfolded(64, 2).eval()
    lorun, merged = convert(net), convert(net)
    merged.merge_adapter()
    for size, repeats in ((128, args.repeats), (16, args.repeats * 10)):
        y, mask = measured(size)
        with torch.inference_mode():
            plain, *others = medians([partial(model, y, mask) for model in (net, lorun, merged)], repeats)
        ratios = [f"{seconds / plain:.3f}" for seconds in others]
        print(f"inference, 64 channels, {size}x{size}: {ratios[0]}; merged {ratios[1]} ({1000 * plain:.1f} ms)")

    for width, rank, size in ((64, 8, 128), (128, 16, 64), (32, 8, 128), (16, 4, 128)):
        time_without_bases(width, rank, size, args.repeats // 2)


if __name__ == "__main__":
    main()
