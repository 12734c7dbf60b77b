"""Compare adapters for noisy measurements with fine-tuning the whole network, as Markdown tables.

    python examples/noise_levels.py examples/ista_net_plus.py IMAGES --converted DIR --judge OTHERS --minutes 5

For each noise level, the original network trains as a whole, and a new adapter set of its conversion in DIR trains on
the frozen base: for the same time, on the same crops of IMAGES, with the same optimiser, schedule, loss and held-out
images. The whole network trains twice, with the learning rates of the adapters and with a quarter of these, which some
networks need; what is better on the held-out images counts. Both are judged on OTHERS. With three levels, the set for
the middle one is then left out, and the set that select_adapter interpolates between the lowest and the highest is
judged in its place.

    MRI_ACCELERATION=8 python examples/noise_levels.py examples/mri.py IMAGES --converted DIR --judge OTHERS
        --sigmas 0 --names acceleration8 --out DIR

does the same for another acceleration; for another camera, set SPECTRAL_IMAGING_APERTURE.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from comparing import bytes_in, parser_of, scores
from torch import nn

from lorun_adapt import Crops, LoRunModel, Task, fit, from_pretrained, held_out_of, load_task

KERNEL, SMALL = 0.02, 0.01  # learning rates relative to the size of a tensor's values, as finetune has them
FACTORS = 1.0, 0.25  # of these rates, for the whole network
PATIENCE = 10  # checks without a better one, as in finetune


def train_whole(net: nn.Module, crops: Crops, judged: Crops, minutes: float) -> nn.Module:
    """Train all of the original network, as ``finetune`` trains adapters, at two learning rates; return the better."""
    held_out, trained = judged.some(), dict[float, nn.Module]()
    for factor in FACTORS:
        own = copy.deepcopy(net).requires_grad_(True)
        rates = [(p, factor * (KERNEL if p.ndim > 1 and p.numel() > 1000 else SMALL)) for p in own.parameters()]
        if not fit(own, crops, rates, loss=crops.loss, minutes=minutes, held_out=held_out, patience=PATIENCE):
            raise KeyboardInterrupt
        with torch.no_grad():
            trained[sum(float(crops.loss(own(*batch), batch)) for batch in held_out)] = own
    return trained[min(trained)]


def psnr(task: Task, files: list[Path], net: nn.Module, sigma: float) -> float:
    return scores(task, files, net, sigma)["psnr"]


def set_bytes(lorun: LoRunModel, name: str) -> int:
    """The size of the set's files in float16."""
    with tempfile.TemporaryDirectory() as folder:
        lorun.save_pretrained(folder, dtype=torch.float16)
        return bytes_in(Path(folder, "adapters", name))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--converted", type=Path, required=True, help="folder of the conversion")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[10, 25, 50], help="noise levels")
    parser.add_argument("--names", nargs="+", help="of the new sets, by default sigma10 and so on")
    parser.add_argument("--also", nargs="+", default=[], help="parameters outside the stages that a set has, too")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each training")
    parser.add_argument("--out", type=Path, help="folder to save the conversion with its new sets to")
    args = parser.parse_args()
    names = dict(zip(args.sigmas, args.names or [f"sigma{sigma:g}" for sigma in args.sigmas], strict=True))

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    lorun = from_pretrained(args.converted, net)
    files, (kept, trained) = task.images(args.judge), held_out_of(task.images(args.images))

    starts, ends = {}, {}
    for sigma in args.sigmas:
        lorun.set_adapter("default")
        starts[sigma] = psnr(task, files, lorun, sigma)
        crops, judged = (Crops(task, part, sigma=sigma) for part in (trained, kept))
        name = names[sigma]
        # A set for another camera, and no other noise, is not one that a noise level should choose.
        noise = None if sigma == lorun.adapter_info["default"].sigma else sigma
        if not lorun.finetune(
            crops, name, sigma=noise, also=args.also, minutes=args.minutes, loss=crops.loss, held_out=judged.some()
        ):
            raise KeyboardInterrupt
        ends[sigma] = psnr(task, files, lorun, sigma)
    if args.out is not None:
        lorun.set_adapter("default")
        lorun.save_pretrained(args.out)
    original, size = sum(2 * p.numel() for p in net.parameters()), set_bytes(lorun, name)
    print(f"A set is {size:,} bytes in float16, {original / size:.1f} times less than the original's {original:,}.\n")
    if len(args.sigmas) == 3:
        low, middle, high = sorted(args.sigmas)
        weights = lorun.weights_for(middle, among=[names[low], names[high]])
        lorun.add_weighted_adapter(list(weights), list(weights.values()), "between")
        lorun.set_adapter("between")
        between = psnr(task, files, lorun, middle)
        print(
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
        share = f"{100 * own / whole:.0f} %" if whole > 0 else "-"
        print(
            f"| {sigma:g} | {before:.2f} | {after:.2f} | {whole:.2f} | {starts[sigma]:.2f} | {ends[sigma]:.2f} "
            f"| {own:.2f} | {share} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
