"""Adapters for noisy measurements against fine-tuning the whole network for them, as Markdown tables.

    python examples/noise_levels.py examples/ista_net_plus.py IMAGES --converted DIR --judge OTHERS --minutes 5

For each noise level the original network, as a whole, and adapters of its conversion in DIR, on the frozen
base, train in equal time on the same crops of IMAGES, with the same optimiser, schedule, loss and held-out images,
and are judged on OTHERS. Then the set for the middle level is left out, and what stands between those for the
lowest and the highest is judged in its place.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import lorun_adapt
from lorun_adapt.network.batches import Batches
from lorun_adapt.network.observe import Observer
from lorun_adapt.task.crops import Crops, held_out_of
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.task import Task, load_task
from lorun_adapt.training.duration import Duration
from lorun_adapt.training.finetune import PATIENCE
from lorun_adapt.training.speed import channels_last
from lorun_adapt.training.supervised import Supervised
from lorun_adapt.training.trained import PRIVATE, TrainedTensor
from lorun_adapt.training.trainer import Trainer, interruptible
from lorun_adapt.util.modules import copy_network
from lorun_adapt.util.seeds import seeded

DENSE = 0.02  # learning rate of the original's kernels, relative to their size, as that of the factors


def train_whole(net: nn.Module, crops: Crops, judged: Crops, minutes: float) -> nn.Module:
    """All of the original network, as ``finetune`` trains adapters."""
    net = copy_network(net).eval().requires_grad_(True)
    rates = [TrainedTensor(p, DENSE if p.ndim > 1 and p.numel() > 1000 else PRIVATE) for p in net.parameters()]
    with seeded(0), interruptible() as stop:
        batches = Batches(crops)
        supervised = Supervised(net, Observer(net, lorun_adapt.find_stages(net), batches.first), crops.loss)
        with channels_last(supervised, batches.first, 0):
            trainer = Trainer(
                supervised,
                rates,
                batches,
                Duration(minutes),
                seed=0,
                resume_from=None,
                run_id="",
                held_out=judged.some(),
                patience=PATIENCE,
                label="fine-tuning the original",
            )
            if not trainer.train(stop):
                raise KeyboardInterrupt
    return net


def psnr(task: Task, files: list[Path], net: nn.Module, sigma: float) -> float:
    with seeded(0):  # the same noise for all
        return evaluate(task, files, net.eval(), None, sigma=sigma).mean()["psnr"]


def set_bytes(lorun: lorun_adapt.LoRunModel, name: str) -> int:
    """Of the set's tensors as files, in float16."""
    with tempfile.TemporaryDirectory() as folder:
        lorun.save_pretrained(folder, dtype=torch.float16)
        return sum(file.stat().st_size for file in Path(folder, "adapters", name).rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of images to train on")
    parser.add_argument("--converted", type=Path, required=True, help="folder of the conversion")
    parser.add_argument("--judge", type=Path, required=True, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint of the original, where the task names none")
    parser.add_argument("--sigmas", type=float, nargs=3, default=[10, 25, 50], help="low, middle, high")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each training")
    parser.add_argument("--out", type=Path, help="folder to save the conversion with its new sets to")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    lorun = lorun_adapt.from_pretrained(args.converted, net)
    files, (kept, trained) = task.images(args.judge), held_out_of(task.images(args.images))

    starts, ends = {}, {}
    for sigma in args.sigmas:
        lorun.set_adapter("default")
        starts[sigma] = psnr(task, files, lorun, sigma)
        crops, judged = (Crops(task, part, sigma=sigma) for part in (trained, kept))
        name = f"sigma{sigma:g}"
        if not lorun.finetune(
            crops, name, noise_schedule=sigma, minutes=args.minutes, loss=crops.loss, held_out=judged.some()
        ):
            raise KeyboardInterrupt
        ends[sigma] = psnr(task, files, lorun, sigma)
    if args.out is not None:
        lorun.save_pretrained(args.out)
    low, middle, high = args.sigmas
    original, size = sum(p.numel() * p.element_size() for p in net.parameters()), set_bytes(lorun, f"sigma{low:g}")
    lorun.set_adapter("default")
    lorun.delete_adapter(f"sigma{middle:g}")
    lorun.select_adapter(middle)
    between = psnr(task, files, lorun, middle)
    print(
        f"A set is {size:,} bytes in float16, {original / size:.1f} times less than the original's {original:,}.\n\n"
        f"| judged at sigma {middle:g} | PSNR (dB) | gain |\n| --- | ---: | ---: |\n"
        f"| converted | {starts[middle]:.2f} | |\n"
        f"| between the sets for {low:g} and {high:g} | {between:.2f} | {between - starts[middle]:.2f} |\n"
        f"| the set for {middle:g} | {ends[middle]:.2f} | {ends[middle] - starts[middle]:.2f} |\n"
    )
    print("| sigma | original | fine-tuned as a whole | gain | converted | adapters alone | gain | share of the gain |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for sigma in args.sigmas:
        crops, judged = (Crops(task, part, sigma=sigma) for part in (trained, kept))
        before = psnr(task, files, net, sigma)
        after = psnr(task, files, train_whole(net, crops, judged, args.minutes), sigma)
        whole, own = after - before, ends[sigma] - starts[sigma]
        print(
            f"| {sigma:g} | {before:.2f} | {after:.2f} | {whole:.2f} | {starts[sigma]:.2f} | {ends[sigma]:.2f} "
            f"| {own:.2f} | {100 * own / whole:.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
