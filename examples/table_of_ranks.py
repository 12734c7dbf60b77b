"""Print what conversion alone costs, as a Markdown table: size, error and quality of a network at several ranks.

python examples/table_of_ranks.py examples/ista_net_plus.py IMAGES
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from comparing import bytes_in, file_bytes, scores, stored

from lorun_adapt import convert, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    files = task.images(args.images)
    parameters, psnr = sum(p.numel() for p in net.parameters()), scores(task, files, net)["psnr"]
    print("| rank | parameters | bytes on disk | relative error | PSNR (dB) |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print(f"| original | {parameters:,} | {file_bytes(stored(net)):,} | 0 | {psnr:.2f} |", flush=True)
    for rank in args.ranks:
        lorun = convert(net, rank=rank, example_inputs=task.example_inputs())
        report = lorun.report()
        with tempfile.TemporaryDirectory() as folder:
            lorun.save_pretrained(folder)
            size = bytes_in(folder)
        psnr = scores(task, files, lorun)["psnr"]
        print(
            f"| {rank} | {report.network_after.num_parameters:,} | {size:,} "
            f"| {report.relative_error:.3f} | {psnr:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
