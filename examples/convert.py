"""Convert the reference network into one base and an adapter per stage, recover its quality, and save it.

python examples/convert.py IMAGES --minutes 6 --out my-net-lorun
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lorun_adapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path, help="folder of images to measure")
parser.add_argument("--minutes", type=float, default=6.0, help="how long to recover")
parser.add_argument("--out", type=Path, required=True, help="folder to save to")
args = parser.parse_args()

task = lorun_adapt.load_task(str(Path(__file__).with_name("compressive_sensing.py")))
net = task.build()
task.load_weights(net, None)
print(lorun_adapt.find_stages(net))

measurements = lorun_adapt.Crops(task, task.images(args.images))  # or any iterable of the forward's arguments
lorun = lorun_adapt.convert(net, rank=8, calibration=measurements, minutes=args.minutes)
print(lorun.report())
lorun.save_pretrained(args.out)  # lorun.push_to_hub("user/name") shares it
