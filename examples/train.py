"""Train the network of a task file, from scratch or from given weights, on random crops of images.

    python examples/train.py examples/mri.py SLICES --minutes 60 --out mri.safetensors

Where there is little time, train one denoiser for all stages first, then let the stages part:

    python examples/train.py examples/spectral_imaging.py CUBES --batch 1 --bf16 --tied --minutes 87
        --out tied.safetensors
    python examples/train.py examples/spectral_imaging.py CUBES --batch 1 --bf16 --weights tied.safetensors --peak 6e-4
        --minutes 20 --out spectral_imaging.safetensors

The optimiser is SOAP: in two minutes it takes the spectral network to 25.9 dB, where Adam takes it to 24.2. The loss is
the root of the mean squared error of each crop, so that dark crops count as bright ones do. The script keeps a
checkpoint beside its output, at most a minute old, and resumes from it when it is started again.

The weights of ``compressive_sensing.py`` are older: they are from an hour on two CPU cores, with Adam and the mean
squared error of the output before it is clamped, on the 400 grey images of the Berkeley segmentation set that DnCNN was
trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from pytorch_optimizer import SOAP
from safetensors.torch import save_file, save_model
from torch import nn
from tqdm import tqdm

from lorun_adapt import Crops, find_stages, load_task


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine to zero; ``done`` in [0, 1]."""
    return peak * min(done / 0.03, 0.5 * (1 + math.cos(math.pi * done)))


def tie(net: nn.Module) -> None:
    """Give all stages the parameters of the first: a step then trains one denoiser on the errors of all stages."""
    for group in find_stages(net).groups:
        first, *others = (net.get_submodule(site.module) for site in group.sites)
        for other in others:
            for name, parameter in first.named_parameters():
                owner, _, attribute = name.rpartition(".")
                setattr(other.get_submodule(owner), attribute, parameter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of training images")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--weights", type=Path, help="checkpoint to start from")
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train, over all restarts")
    parser.add_argument("--batch", type=int, help="crops in a batch; by default 17,000 pixels")
    parser.add_argument(
        "--sigma", type=float, nargs="+", default=[0.0], help="noise (0..255); with several, each batch has one of them"
    )
    parser.add_argument("--tied", action="store_true", help="all stages share their weights")
    parser.add_argument("--peak", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision for the first three quarters, where the CPU is fast at it"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    task = load_task(args.task)
    net = task.build()
    if args.weights is not None:
        task.load_weights(net, args.weights)
    if args.tied:
        tie(net)
    net.train()
    optimizer = SOAP(net.parameters(), lr=args.peak, weight_decay=0.0, max_precondition_dim=512)
    elapsed, steps = 0.0, 0
    checkpoint = args.out.with_suffix(".checkpoint")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        elapsed, steps = state["elapsed"], state["steps"]
    images = task.images(args.images)
    streams = [  # another seed after each restart, so that it sees other crops
        iter(Crops(task, images, sigma=sigma, size=args.batch, seed=steps, dimmed=0.0)) for sigma in args.sigma
    ]

    def save_checkpoint() -> None:
        state = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "elapsed": elapsed,
            "steps": steps,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        os.replace(checkpoint.with_suffix(".partial"), checkpoint)

    limit, running, saved = args.minutes * 60, 0.0, time.monotonic()
    try:
        with tqdm(total=round(limit), initial=round(elapsed), unit="s") as bar:
            while elapsed < limit:
                started = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(elapsed / limit, args.peak)
                batch = next(streams[int(torch.randint(len(streams), ()))])
                with torch.autocast("cpu", enabled=args.bf16 and elapsed < 0.75 * limit):
                    output = net(*batch)
                errors = (task.restored(output, batch.truth).float() - batch.truth).square().flatten(1).mean(1)
                optimizer.zero_grad()
                (errors + 1e-8).sqrt().mean().backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                steps += 1
                psnr = -10 * float((errors.detach() + 1e-8).log10().mean())
                running = psnr if not running else 0.99 * running + 0.01 * psnr
                elapsed += time.monotonic() - started
                bar.set_postfix(step=steps, psnr=f"{running:.2f}", refresh=False)
                bar.update(round(elapsed) - bar.n)
                if time.monotonic() - saved > 60:
                    save_checkpoint()
                    saved = time.monotonic()
    finally:
        save_checkpoint()
    if args.tied:  # each stage has weights of its own in the file
        save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, str(args.out))
    else:
        save_model(net, str(args.out))  # it writes a tensor under one name only, where the network has several
    checkpoint.unlink(missing_ok=True)
    print(f"{steps} steps, {args.out}")


if __name__ == "__main__":
    main()
