"""PSNR against bytes on disk: the network as it is, pruned, and converted, each in 32, 16 and 8 bits.

    python examples/bytes_and_quality.py TASK --judge OTHERS --converted FOLDER --results FILE --plot PICTURE
    python examples/bytes_and_quality.py TASK --judge OTHERS --prune IMAGES --shares 0.2 --minutes 40 --results FILE

The rows are added to FILE; the table and the picture are of all rows in it. Bytes are those of safetensors files with
one adapter set. In 8 bits, the kernels and matrices of the stages are rounded, with a scale for each output channel,
and nothing else is. Pruning keeps the given shares of these, the largest, and trains them end to end from the
original, with the optimiser and the loss of recovery; its file has one bit for each weight, which says whether it is
there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_methods import Pruning, owner_of, places, rates_of
from comparing import bytes_in, file_bytes, rows_of, scores, stored
from torch import Tensor, nn

from lorun_adapt import Crops, StageMap, find_stages, fit, from_pretrained, load_task

DTYPES = {32: torch.float32, 16: torch.float16, 8: torch.int8}


def rounded(tensor: Tensor, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The values that ``bits`` bits leave, and what a file holds of them; 8 bits have a scale for each first index."""
    if bits > 8:
        part = tensor.to(DTYPES[bits])
        return part.to(tensor.dtype), {"": part}
    rows = tensor.reshape(len(tensor), -1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = torch.where(scale > 0, rows / scale.float(), 0).round().clamp(-127, 127)
    return (values * scale.float()).view_as(tensor), {"": values.to(torch.int8).view_as(tensor), ":scale": scale}


def with_tensors(net: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of the network with some tensors replaced."""
    net = copy.deepcopy(net)
    for name, tensor in tensors.items():
        module, attribute = owner_of(net, name)
        getattr(module, attribute).data.copy_(tensor)
    return net


class Ways:
    """The ways to store ``net``. Each returns a network and the bytes of its file, for a number of bits."""

    def __init__(self, net: nn.Module, stage_map: StageMap) -> None:
        self.net, self.stage_map = net, stage_map
        names = [name for _, names in places(stage_map) for name in names]
        self.kernels = [name for name in names if net.get_parameter(name).ndim > 1]

    def plain(self, bits: int) -> tuple[nn.Module, int]:
        return self._stored(bits, self.net, {})

    def pruned(self, bits: int, pruning: Pruning) -> tuple[nn.Module, int]:
        return self._stored(bits, pruning.net, dict(zip(self.kernels, pruning.masks)))

    def converted(self, bits: int, folder: Path) -> tuple[nn.Module, int]:
        lorun = from_pretrained(folder, self.net)
        with tempfile.TemporaryDirectory() as place:
            lorun.save_pretrained(place, DTYPES[bits], selected_adapters=["default"])
            return from_pretrained(place, self.net), bytes_in(place)

    def _stored(self, bits: int, trained: nn.Module, masks: dict[str, Tensor]) -> tuple[nn.Module, int]:
        """The network with the values of ``trained``, which may compute its tensors from others."""
        values, file = {}, {}
        for name in stored(self.net):
            module, attribute = owner_of(trained, name)
            tensor = getattr(module, attribute).detach()
            is_rounded = tensor.is_floating_point() and (bits > 8 or name in self.kernels)
            values[name], parts = rounded(tensor, bits) if is_rounded else (tensor, {"": tensor})
            if name in masks:
                parts[""] = parts[""][masks[name] > 0]
                parts[":mask"] = torch.zeros(math.ceil(tensor.numel() / 8), dtype=torch.uint8)
            file |= {name + part: value for part, value in parts.items()}
        return with_tensors(self.net, values), file_bytes(file)


def prune(ways: Ways, crops: Crops, share: float, minutes: float) -> Pruning:
    pruning = Pruning(ways.net, ways.stage_map, file_bytes(stored(ways.net)), 60 * minutes)
    pruning.keep = share
    rates = rates_of(pruning.net)
    if not fit(pruning.net, crops, rates, teacher=ways.net, stage_map=ways.stage_map, minutes=minutes):
        raise KeyboardInterrupt
    with torch.no_grad():
        pruning.net(*next(iter(crops)))  # masks as many as in the end
    return pruning


# --- results -------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| network | way | bits | bytes | times fewer | PSNR (dB) | below |", "| --- | --- " + "| ---: " * 5 + "|"]
    for row in rows:
        fewer, below = row["whole"] / row["bytes"], row["original"] - row["psnr"]
        lines.append(
            f"| {row['network']} | {row['way']} | {row['bits']} | {row['bytes']:,} | {fewer:.1f} | {row['psnr']:.2f} "
            f"| {below:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure, panels = plt.subplots(1, len(networks), figsize=(3.6 * len(networks), 3.4), squeeze=False)
    for panel, network in zip(panels[0], networks):
        for way in ways:
            own = [row for row in rows if row["network"] == network and row["way"] == way]
            if own:
                fewer = [row["whole"] / row["bytes"] for row in own]
                below = [row["original"] - row["psnr"] for row in own]
                panel.plot(fewer, below, "o-", color=f"C{ways.index(way)}", label=way, markersize=4)
                for x, y, row in zip(fewer, below, own):
                    panel.annotate(str(row["bits"]), (x, y), textcoords="offset points", xytext=(3, 4), fontsize=7)
        panel.axhline(0.15, color="grey", linewidth=0.6, linestyle=":")
        panel.set(title=network, xscale="log", xlabel="times fewer bytes than the original in 32 bits")
        ticks = [1, 2, 4, 8, 16, 32]
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.invert_yaxis()
        panel.margins(y=0.12)
        panel.legend(fontsize=7, loc="best")
    panels[0][0].set_ylabel("dB below the original")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("--judge", type=Path, required=True, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    parser.add_argument("--converted", type=Path, nargs="+", default=[], help="folders with conversions of the network")
    parser.add_argument("--prune", type=Path, help="folder of images to prune on")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2], help="of the weights, to keep")
    parser.add_argument("--minutes", type=float, default=20.0, help="to prune for, for each share")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines to add to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    judged = task.images(args.judge)
    ways = Ways(net, find_stages(net, example_inputs=task.example_inputs()))
    original, whole = scores(task, judged, net)["psnr"], ways.plain(32)[1]

    def add(way: str, stored_in: Callable[[int], tuple[nn.Module, int]]) -> None:
        with args.results.open("a") as file:
            for bits in DTYPES:
                network, size = stored_in(bits)
                row = {"network": Path(args.task).stem, "way": way, "bits": bits, "bytes": size, "whole": whole}
                psnr = scores(task, judged, network)["psnr"]
                print(json.dumps({**row, "psnr": psnr, "original": original}), file=file, flush=True)

    if args.converted:
        add("as it is", ways.plain)
    for folder in args.converted:
        report = from_pretrained(folder, net).report()
        share = report.network_after.num_parameters / report.network_before.num_parameters
        add(f"converted to {100 * share:.0f} %", lambda bits, folder=folder: ways.converted(bits, folder))
    for share in args.shares if args.prune else ():
        pruning = prune(ways, Crops(task, task.images(args.prune)), share, args.minutes)
        add(f"pruned to {100 * share:.0f} %", lambda bits, pruning=pruning: ways.pruned(bits, pruning))
    rows = rows_of(args.results)
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
