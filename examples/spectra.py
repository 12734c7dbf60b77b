"""Draw a restored cube in false colour, and its spectra at marked points beside the true ones.

    python examples/spectra.py --converted adapters/spectral_imaging --out spectra.png
    python examples/spectra.py --cube MINE.npy --points 40,60 90,100 --out mine.png

Without ``--cube``, it restores a synthetic scene that comes with it. ``pip install 'lorun-adapt[examples]'``.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import torch

from lorun_adapt import from_pretrained, load_task, psnr

HERE = Path(__file__).parent
COLOURS = ("tab:orange", "tab:green", "tab:purple", "tab:brown")
STYLES = {"truth": "-", "network": "--", "converted": ":"}


def point(text: str) -> tuple[int, int]:
    row, column = map(int, text.split(","))
    return row, column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cube", type=Path, default=HERE / "spectral_scene.npz", help="array file, (H, W, 28)")
    parser.add_argument("--weights", type=Path, help="checkpoint, instead of the weights that come with it")
    parser.add_argument("--converted", type=Path, help="folder of a conversion, to draw that as well")
    parser.add_argument("--points", type=point, nargs="+", default=[(30, 40), (64, 100), (110, 60)], help="row,column")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()

    task = load_task(str(HERE / "spectral_imaging.py"))
    net = task.build()
    task.load_weights(net, args.weights)
    truth = task.read(args.cube)[None]
    torch.manual_seed(0)
    arguments = task.measure(truth)
    cubes = {"truth": truth, "network": task.run(net, arguments, truth)}
    if args.converted is not None:
        cubes["converted"] = task.run(from_pretrained(args.converted, net).eval(), arguments, truth)

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(cubes) + 1, figsize=(15, 4), width_ratios=[1] * len(cubes) + [1.6])
    for panel, (name, cube) in zip(panels, cubes.items()):
        panel.imshow(task.picture(cube)[0].movedim(0, -1).numpy())
        panel.set_title(name if name == "truth" else f"{name}: {psnr(cube[0], truth[0]):.2f} dB")
        panel.set_axis_off()
        for (row, column), colour in zip(args.points, itertools.cycle(COLOURS)):
            panel.plot(column, row, "o", markersize=9, fillstyle="none", markeredgewidth=2, color=colour)
    wavelengths = np.linspace(450, 650, truth.shape[1])
    for (row, column), colour in zip(args.points, itertools.cycle(COLOURS)):
        for name, cube in cubes.items():
            panels[-1].plot(wavelengths, cube[0, :, row, column], STYLES[name], color=colour)
    for name in cubes:
        panels[-1].plot([], [], STYLES[name], color="black", label=name)
    panels[-1].set(xlabel="wavelength (nm)", ylabel="intensity", title="spectra at the marked points")
    panels[-1].legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
