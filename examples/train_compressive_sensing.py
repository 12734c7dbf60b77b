"""Train the reference network of ``compressive_sensing.py`` from a folder of images.

    python examples/train_compressive_sensing.py IMAGES --minutes 60 --bf16

The weights beside the script were trained this way on two CPU cores, on the 400 grey images of the
Berkeley segmentation set that DnCNN was trained on. The script keeps a checkpoint beside its output
and resumes from it when it is started again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import compressive_sensing as task
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


def read_images(folder: Path) -> list[Tensor]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".png", ".bmp", ".jpg", ".jpeg", ".tif"})
    images = [torch.from_numpy(np.array(Image.open(p).convert("L")))[None] / 255 for p in files]
    images = [image for image in images if min(image.shape[-2:]) >= task.patch]
    if not images:
        raise SystemExit(f"no image of {task.patch} or more pixels a side in {folder}: give larger images")
    return images


def random_patches(images: list[Tensor], count: int) -> Tensor:
    """Random crops (count, 1, 99, 99), rotated and mirrored at random."""
    patches = []
    for _ in range(count):
        image = images[torch.randint(len(images), ()).item()]
        top, left = (torch.randint(side - task.patch + 1, ()).item() for side in image.shape[-2:])
        crop = image[:, top : top + task.patch, left : left + task.patch]
        crop = torch.rot90(crop, torch.randint(4, ()).item(), (-2, -1))
        patches.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    return torch.stack(patches)


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine to zero; ``done`` in [0, 1]."""
    return peak * min(done / 0.03, 0.5 * (1 + math.cos(math.pi * done)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of training images")
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train, over all restarts")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--peak", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision for the first three quarters (twice as fast on a CPU with AMX)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name(task.weights))
    args = parser.parse_args()

    torch.manual_seed(0)
    images = read_images(args.images)
    net = task.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.peak)
    elapsed, steps = 0.0, 0
    checkpoint = args.out.with_suffix(".checkpoint")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        elapsed, steps = state["elapsed"], state["steps"]

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
                truth = random_patches(images, args.batch)
                measured = task.measure(truth)
                with torch.autocast("cpu", enabled=args.bf16 and elapsed < 0.75 * limit):
                    loss = F.mse_loss(net(*measured), truth)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                optimizer.step()
                steps += 1
                running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
                elapsed += time.monotonic() - started
                bar.set_postfix(step=steps, psnr=f"{-10 * math.log10(running):.2f}", refresh=False)
                bar.update(round(elapsed) - bar.n)
                if time.monotonic() - saved > 60:
                    save_checkpoint()
                    saved = time.monotonic()
    finally:
        save_checkpoint()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, args.out)
    checkpoint.unlink(missing_ok=True)
    print(f"{steps} steps, {args.out}")


if __name__ == "__main__":
    main()
