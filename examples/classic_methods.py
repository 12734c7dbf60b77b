"""Compare a network with what its field used before networks, on images of your own, as a Markdown table.

    python examples/classic_methods.py examples/spectral_imaging.py CUBES --metric sam
    python examples/classic_methods.py examples/super_resolution.py IMAGES --metric psnr_y
    python examples/classic_methods.py examples/mri.py SLICES

The first row is what the task's network starts from: smoothed projections, bicubic interpolation, the zero-filled
image. Snapshot spectral imaging is also compared with GAP-TV (Yuan, arXiv:1511.03890), whose weight of the total
variation was chosen on training cubes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from comparing import scores
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn

from lorun_adapt import Task, from_pretrained, load_task


class FirstEstimate(nn.Module):
    """What the task's network starts from, as a network."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.first_estimate = task.module.first_estimate

    def forward(self, *arguments: Any) -> Any:
        return self.first_estimate(*arguments)


class GapTV(nn.Module):
    """Generalised alternating projection with total variation, accelerated; detector images and mask -> cubes."""

    def __init__(self, task: Task, iterations: int = 100, weight: float = 0.1) -> None:
        super().__init__()
        self.camera, self.iterations, self.weight = task.module, iterations, weight

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        return self.camera.projections(y, mask, self._denoise, self.iterations)

    def _denoise(self, cubes: Tensor) -> Tensor:
        denoised = [denoise_tv_chambolle(cube.numpy(), self.weight, channel_axis=0) for cube in cubes]
        return torch.stack([torch.as_tensor(cube) for cube in denoised]).to(cubes)


CLASSIC = {"spectral_imaging": {"GAP-TV": GapTV}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    parser.add_argument("--converted", type=Path, help="folder of a conversion, to add a row for it")
    parser.add_argument("--metric", action="append", default=[], help="beside psnr and ssim; repeatable")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    networks: dict[str, nn.Module] = {"first estimate": FirstEstimate(task)}
    networks |= {name: method(task) for name, method in CLASSIC.get(Path(args.task).stem, {}).items()}
    networks["network"] = net
    if args.converted is not None:
        networks["converted"] = from_pretrained(args.converted, net)
    metrics = ["psnr", "ssim", *args.metric]
    print(f"| | {' | '.join(metrics)} |\n| --- |{' ---: |' * len(metrics)}", flush=True)
    for name, network in networks.items():
        mean = scores(task, task.images(args.images), network, metrics=metrics)
        print(f"| {name} | {' | '.join(f'{mean[metric]:.4g}' for metric in metrics)} |", flush=True)


if __name__ == "__main__":
    main()
