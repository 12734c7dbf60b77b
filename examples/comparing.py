"""What the scripts that compare networks share: arguments, scores from the same measurements, sizes of files."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorun_adapt import Task, evaluate


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser for a task file, images to train on, others to judge on, and weights."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of images to train on")
    parser.add_argument("--judge", type=Path, required=True, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    return parser


def scores(
    task: Task, files: list[Path], net: nn.Module, sigma: float = 0.0, metrics: Sequence[str] = ()
) -> dict[str, float]:
    """The mean over images of PSNR, SSIM and further metrics, by name; each call draws the same masks and noise."""
    torch.manual_seed(0)
    return evaluate(task, files, net.eval(), None, sigma=sigma, metrics=metrics).mean()


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def bytes_in(folder: str | Path) -> int:
    """The size of the safetensors files in a folder and those below it."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def stored(net: nn.Module) -> dict[str, Tensor]:
    """The tensors that a file of the network holds, each once."""
    names = {id(tensor): name for name, tensor in reversed(net.state_dict(keep_vars=True).items())}
    return {name: tensor for name, tensor in net.state_dict(keep_vars=True).items() if names[id(tensor)] == name}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of a safetensors file of these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        return path.stat().st_size
