"""Download a conversion of the reference network from the Hub, and restore a photograph with each adapter set.

python examples/download.py user/name
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from skimage.data import camera

import lorun_adapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repository", help="repository on the Hub, as user/name, or a folder")
parser.add_argument("--revision", help="branch, tag or commit")
args = parser.parse_args()

task = lorun_adapt.load_task(str(Path(__file__).with_name("compressive_sensing.py")))
lorun = lorun_adapt.from_pretrained(args.repository, task.build(), revision=args.revision).eval()

image = torch.from_numpy(camera())[None, None, 100:300, 150:350] / 255
for name in lorun.adapter_names:
    lorun.set_adapter(name)
    sigma = lorun.adapter_info[name].sigma or 0.0
    torch.manual_seed(0)
    restored = task.run(lorun, task.measure(image, sigma), image)
    print(f"{name}: {lorun_adapt.psnr(restored[0], image[0]):.2f} dB, with noise of sigma {sigma:g}")
