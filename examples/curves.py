"""Time, memory and conversion time against stages, channels, rank and image size; recovery against processes.

    python examples/curves.py --results FILE --plot PICTURE

The network is that of benchmark.py, an ISTA iteration with four kernels in each stage. Times of forwards are ratios of
medians of runs that alternate with the original. Throughput is that of recovery of the reference network, without its
start-up, one thread a process. FILE gets a row for each point as it is done; a point that it has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import Unfolded, measured, medians, without_bases
from comparing import rows_of

from lorun_adapt import convert, load_task

USUAL = {"stages": 9, "channels": 64, "rank": 8, "size": 64}
POINTS = {
    "stages": [3, 6, 12, 24, 48],
    "channels": [16, 32, 64, 128, 256],
    "rank": [1, 4, 16, 64],
    "size": [16, 32, 128, 256],
}
LABELS = {"stages": "stages", "channels": "channels", "rank": "rank", "size": "pixels a side"}
WAYS = {"lean": "computed in each forward", "merged": "merged", "without": "without bases"}
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


def forward_times(stages: int, channels: int, rank: int, size: int, repeats: int) -> dict[str, float]:
    """Times of a forward relative to the original's, bytes of weights relative to its, and seconds to convert it."""
    net = Unfolded(channels, 2, stages).eval()
    started = time.perf_counter()
    lorun = convert(net, rank=rank).eval()
    seconds = time.perf_counter() - started
    merged = convert(net, rank=rank).eval()
    merged.merge_adapter()
    others = {"lean": lorun, "merged": merged, "without": without_bases(net, channels, rank)}
    report, inputs = lorun.report(), measured(size)
    with torch.inference_mode():
        plain, *times = medians([partial(model, *inputs) for model in (net, *others.values())], repeats)
    return {
        **{name: value / plain for name, value in zip(others, times)},
        "bytes": report.network_after.num_bytes / report.network_before.num_bytes,
        "convert": seconds,
    }


def recover_for_throughput() -> None:
    """Recover for a few steps and for more, and print how many images a second the difference is."""
    torch.set_num_threads(1)
    task = load_task(str(Path(__file__).with_name("compressive_sensing.py")))
    net = task.build()
    task.load_weights(net, None)
    batches = [task.measure(torch.rand(8, 1, 33, 33)) for _ in range(12)]
    times = []
    for steps in (10, 50):
        lorun = convert(net, rank=8)
        started = time.perf_counter()
        lorun.recover(net, batches, steps=steps)
        times.append(time.perf_counter() - started)
    print(json.dumps(40 * 8 / (times[1] - times[0])))


def throughput(processes: int) -> float:
    """Images a second of all processes together."""
    command = [sys.executable, *LAUNCH, "--num_processes", str(processes), *["--multi_gpu"] * (processes > 1)]
    done = subprocess.run([*command, __file__, "--recover"], capture_output=True, text=True, check=True)
    return processes * float(done.stdout.split()[-1])


def measure(file: Path, repeats: int, points: dict[str, list[int]], processes: list[int]) -> None:
    settings = [USUAL] + [{**USUAL, axis: value} for axis in points for value in points[axis]]
    for setting in settings:
        add(file, setting, partial(forward_times, **setting, repeats=repeats))
    for number in processes:
        add(file, {"processes": number}, lambda number=number: {"images": throughput(number)})


def add(file: Path, setting: dict[str, int], values: Callable[[], dict[str, float]]) -> None:
    if setting in [row["setting"] for row in rows_of(file)]:
        return
    row = json.dumps({"setting": setting, "values": values()})
    with file.open("a") as handle:
        print(row, file=handle, flush=True)
    print(row, flush=True)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 4, figsize=(13, 8))
    for column, axis in enumerate(USUAL):
        others = {name: value for name, value in USUAL.items() if name != axis}
        own = [row for row in rows if others.items() <= row["setting"].items()]
        own.sort(key=lambda row: row["setting"][axis])
        x = [row["setting"][axis] for row in own]
        kinds = [WAYS, {"bytes": "converted, one set"}, {"convert": "without data"}]
        for panel, names in zip(panels[:, column], kinds if axis != "size" else [WAYS]):
            for name, label in names.items():
                panel.plot(x, [row["values"][name] for row in own], "o-", label=label, markersize=4)
            panel.set(xscale="log", xlabel=LABELS[axis])
            panel.set_xticks(x, map(str, x))
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            if column == 0:
                panel.legend(fontsize=8)
        panels[0, column].axhline(1, color="grey", linewidth=0.6, linestyle=":")
    panels[0, 0].set_ylabel("time of a forward\n(original: 1)")
    panels[1, 0].set_ylabel("bytes of weights\n(original: 1)")
    panels[2, 0].set_ylabel("seconds to convert")
    panels[1, 3].axis("off")
    own = sorted((r for r in rows if "processes" in r["setting"]), key=lambda row: row["setting"]["processes"])
    panels[2, 3].bar([str(row["setting"]["processes"]) for row in own], [row["values"]["images"] for row in own], 0.5)
    panels[2, 3].set(xlabel="processes", ylabel="images a second in recovery")
    figure.suptitle("9 stages, 64 channels, rank 8, 64x64 pixels, except where shown otherwise")
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="file of JSON lines to add to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--repeats", type=int, default=7)
    for axis, values in POINTS.items():
        parser.add_argument(f"--{axis}", type=int, nargs="*", default=values)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--recover", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.recover:
        recover_for_throughput()
        return
    if args.results is None:
        parser.error("give --results")
    measure(args.results, args.repeats, {axis: getattr(args, axis) for axis in POINTS}, args.processes)
    if args.plot is not None:
        plot(rows_of(args.results), args.plot)


if __name__ == "__main__":
    main()
