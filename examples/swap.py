"""Swap adapter sets while the network runs: the reference network and measurements with more and more noise.

python examples/swap.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from skimage.data import camera

import lorun_adapt
from lorun_adapt.task.evaluate import psnr
from lorun_adapt.task.task import load_task

here = Path(__file__).parent
task = load_task(str(here / "compressive_sensing.py"))
lorun = lorun_adapt.from_pretrained(here.parent / "adapters/compressive_sensing", task.build()).eval()
lorun.task = task  # which estimates the noise of measurements

image = torch.from_numpy(camera())[None, None, 100:300, 150:350] / 255
torch.manual_seed(0)
print("noise    default    chosen by estimated noise")
for sigma in (0, 10, 20, 30, 40, 45):
    measurements = task.measure(image, sigma)
    lorun.set_adapter("default")
    default = psnr(task.run(lorun, measurements, image)[0], image[0])
    chosen = lorun.select_adapter("auto", *measurements)  # or select_adapter(sigma), or set_adapter("sigma25")
    best = psnr(task.run(lorun, measurements, image)[0], image[0])
    print(f"{sigma:5d} {default:7.2f} dB {best:7.2f} dB  {chosen} for {lorun.adapter_info[chosen].sigma:.1f}")
lorun.set_adapter({0: "default", 8: "sigma25"})  # or another set in some of the stages
