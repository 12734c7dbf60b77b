"""Make synthetic spectral cubes, (H, W, 28) from 450 to 650 nm, from grey photographs and measured spectra.

    python examples/spectral_cubes.py PHOTOGRAPHS OUT --count 200

With ``--colour``, it writes the cubes as colour images, to train ``super_resolution.py`` where there are grey
photographs only.

Each region of a scene has reflectances of its own, measured on colour charts, under two illuminants that mix smoothly;
photographs give the regions, their shading and their texture. Reflectances and illuminants come from colour-science
(``pip install 'lorun-adapt[examples]'``). The cubes are synthetic: figures on them do not compare with those on
photographed ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from spectral_imaging import picture
from tqdm import tqdm

BANDS = 28
WAVELENGTHS = np.linspace(450, 650, BANDS)  # nm
REGIONS = 8  # in a scene

Array = NDArray[np.float64]


def measured_spectra() -> tuple[Array, Array]:
    """Reflectances (150, 28) of colour charts, and illuminants (59, 28) of the CIE, each with a largest value of 1."""
    import colour

    charts = {id(chart): chart for chart in colour.SDS_COLOURCHECKERS.values()}
    patches = [patch for chart in charts.values() for patch in chart.values()]
    reflectances = np.stack([np.interp(WAVELENGTHS, sd.wavelengths, sd.values) for sd in patches])
    lights = colour.SDS_ILLUMINANTS.values()
    illuminants = np.stack([np.interp(WAVELENGTHS, sd.wavelengths, sd.values) for sd in lights])
    return reflectances, illuminants / illuminants.max(1, keepdims=True)


def make_cube(photographs: list[Array], spectra: tuple[Array, Array], side: int, rng: np.random.Generator) -> Array:
    """A scene (side, side, 28) in [0, 1]; ``photographs`` are grey, in [0, 1]."""
    reflectances, illuminants = spectra
    shading, shape, texture, light = (_crop(photographs, side, rng) for _ in range(4))
    levels = np.argsort(np.argsort(gaussian_filter(shape, 4).ravel())).reshape(side, side)
    region = np.minimum(levels * REGIONS // side**2, REGIONS - 1)
    first, second = (reflectances[rng.integers(len(reflectances), size=REGIONS)][region] for _ in range(2))
    reflected = gaussian_filter(first + texture[..., None] * (second - first), (0.7, 0.7, 0))  # as optics blur edges
    mixed = gaussian_filter(light, side / 8)
    mixed = (mixed - mixed.min()) / max(np.ptp(mixed), 1e-6)
    warm, cold = illuminants[rng.choice(len(illuminants), 2, replace=False)]
    cube = reflected * (warm + mixed[..., None] * (cold - warm)) * (0.2 + 0.8 * shading[..., None])
    return np.clip(cube / np.quantile(cube, 0.999), 0, 1)


def _crop(photographs: list[Array], side: int, rng: np.random.Generator) -> Array:
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(have - side + 1) for have in photograph.shape)
    crop = np.rot90(photograph[top : top + side, left : left + side], rng.integers(4))
    return crop[:, ::-1] if rng.integers(2) else crop


def read_photographs(folder: Path, side: int) -> list[Array]:
    """Grey photographs in [0, 1] that have a square of this side."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".tif"))
    images = [np.asarray(Image.open(file).convert("L"), np.float64) / 255 for file in files]
    images = [image for image in images if min(image.shape) >= side]
    if not images:
        raise SystemExit(f"no photograph of {side} or more pixels a side in {folder}: give larger ones, or --side")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of photographs")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=200, help="how many cubes")
    parser.add_argument("--side", type=int, default=160, help="of a cube, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--colour", action="store_true", help="write colour images instead of cubes")
    args = parser.parse_args()
    photographs, spectra = read_photographs(args.photographs, args.side), measured_spectra()
    args.out.mkdir(parents=True, exist_ok=True)
    for k in tqdm(range(args.count), unit="cube"):
        cube = make_cube(photographs, spectra, args.side, np.random.default_rng([args.seed, k]))
        if args.colour:
            pixels = picture(torch.from_numpy(cube).movedim(-1, 0)[None])[0].movedim(0, -1)
            Image.fromarray((255 * pixels).round().byte().numpy()).save(args.out / f"scene{k:03d}.png")
        else:
            np.save(args.out / f"scene{k:03d}.npy", np.round(65535 * cube).astype(np.uint16))


if __name__ == "__main__":
    main()
