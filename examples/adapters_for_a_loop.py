"""What adapters add to a network that shares its denoiser already, at equal extra training, as a Markdown table.

    python examples/adapters_for_a_loop.py examples/super_resolution.py IMAGES --judge OTHERS --rank 1 --steps 1500

A denoiser that is called in a loop is the same in every iteration. Adapters give each iteration weights of its own. The
network alone, adapters alone on the frozen network, and the network together with adapters train for as many steps, on
the same crops of IMAGES, with the same optimiser, schedule, loss and held-out images, and are judged on OTHERS.
"""

from __future__ import annotations

import copy
from pathlib import Path

from comparing import parser_of, scores
from torch import nn

from lorun_adapt import Crops, convert, fit, held_out_of, load_task

RATE, SMALL = 0.02, 0.01  # learning rates relative to the size of a tensor's values, as finetune has them


def train(network: nn.Module, crops: Crops, judged: Crops, steps: int) -> None:
    """Train all parameters that require gradients."""
    rates = [(p, RATE if p.ndim > 1 else SMALL) for p in network.parameters() if p.requires_grad]
    if not fit(network, crops, rates, loss=crops.loss, steps=steps, held_out=judged.some()):
        raise KeyboardInterrupt


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--sigma", type=float, default=0.0, help="noise on the measurements (0..255)")
    parser.add_argument("--steps", type=int, default=1500, help="of each training")
    parser.add_argument("--metric", action="append", default=[], help="beside psnr; repeatable")
    parser.add_argument("--out", type=Path, help="folder to save the adapters alone to")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    kept, trained = held_out_of(task.images(args.images))
    crops, judged = (Crops(task, part, sigma=args.sigma) for part in (trained, kept))
    metrics = ["psnr", *args.metric]
    print(f"| | parameters | {' | '.join(metrics)} |\n| --- | ---: |{' ---: |' * len(metrics)}")

    def show(name: str, network: nn.Module) -> None:
        mean = scores(task, task.images(args.judge), network, args.sigma, metrics)
        size = sum(p.numel() for p in network.parameters())
        print(f"| {name} | {size:,} | {' | '.join(f'{mean[metric]:.2f}' for metric in metrics)} |", flush=True)

    show("as published", net)
    alone = copy.deepcopy(net).requires_grad_(True)
    train(alone, crops, judged, args.steps)
    show("network trained on", alone)
    lorun = convert(net, rank=args.rank, example_inputs=task.example_inputs())
    train(lorun, crops, judged, args.steps)
    show("adapters alone", lorun)
    if args.out is not None:
        lorun.save_pretrained(args.out)
    both = convert(net, rank=args.rank, example_inputs=task.example_inputs()).requires_grad_(True)
    train(both, crops, judged, args.steps)
    show("network and adapters", both)


if __name__ == "__main__":
    main()
