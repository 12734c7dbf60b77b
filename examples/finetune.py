"""Train a new adapter set of the reference network for noisy measurements; the base stays frozen.

python examples/finetune.py IMAGES --sigma 35 --minutes 5 --out my-net-lorun
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lorun_adapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path, help="folder of images")
parser.add_argument("--sigma", type=float, default=35.0, help="noise on the measurements (0 to 255)")
parser.add_argument("--minutes", type=float, default=5.0, help="how long to train")
parser.add_argument("--out", type=Path, required=True, help="folder to save to")
args = parser.parse_args()

here = Path(__file__).parent
task = lorun_adapt.load_task(str(here / "compressive_sensing.py"))
lorun = lorun_adapt.from_pretrained(here.parent / "adapters/compressive_sensing", task.build())

held_out, images = lorun_adapt.held_out_of(task.images(args.images))
crops = lorun_adapt.Crops(
    task, images, sigma=args.sigma
)  # or any iterable of the forward's arguments and what the loss needs
known = [name for name in lorun.adapter_names if lorun.adapter_info[name].sigma is not None]
lorun.finetune(
    crops,
    f"sigma{args.sigma:g}-own",
    known,  # it starts between the two sets whose noise levels are nearest
    sigma=args.sigma,
    minutes=args.minutes,
    loss=crops.loss,
    held_out=lorun_adapt.Crops(task, held_out, sigma=args.sigma).some(),
)
lorun.save_pretrained(args.out)
