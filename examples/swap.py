"""Swap adapter sets while the reference network runs, on measurements with more and more noise.

python examples/swap.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from skimage.data import camera

import lorun_adapt

here = Path(__file__).parent
task = lorun_adapt.load_task(str(here / "compressive_sensing.py"))
lorun = lorun_adapt.from_pretrained(here.parent / "adapters/compressive_sensing", task.build()).eval()
lorun.task = task  # it estimates the noise of the measurements

image = torch.from_numpy(camera())[None, None, 100:300, 150:350] / 255
torch.manual_seed(0)
print("noise    default    chosen by estimated noise")
for sigma in (0, 10, 20, 30, 40, 45):
    measurements = task.measure(image, sigma)
    lorun.set_adapter("default")
    default = lorun_adapt.psnr(task.run(lorun, measurements, image)[0], image[0])
    chosen = lorun.select_adapter("auto", *measurements)  # or select_adapter(sigma), or set_adapter("sigma25")
    best = lorun_adapt.psnr(task.run(lorun, measurements, image)[0], image[0])
    print(f"{sigma:5d} {default:7.2f} dB {best:7.2f} dB  {chosen} for {lorun.adapter_info[chosen].sigma:.1f}")
lorun.set_adapter({0: "default", 8: "sigma25"})  # stages can run with different sets
print(f"active adapters: {lorun.active_adapters}")
