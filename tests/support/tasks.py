"""Task modules as files, and the command line run on them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lorun_adapt.cli import main as cli

EXAMPLES = Path(__file__).parents[2] / "examples"

COLOUR_TASK = """
import torch
from torch import nn
from dun_zoo import Block, Denoiser, ListOfBlocks

channels = 3
patch = 16

class Colour(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ListOfBlocks([Block(Denoiser()) for _ in range(3)])
    def forward(self, y, extra):
        b, c, h, w = y.shape
        flat = y.reshape(b * c, 1, h, w)
        return {"image": self.net(flat, extra["mask"][0].expand_as(flat)).reshape(y.shape)}

def build():
    return Colour()

def measure(images, sigma=0.0):
    mask = torch.ones(1, 1, *images.shape[-2:])
    mask[..., ::2, ::3] = 0
    return (images + sigma / 255 * torch.randn_like(images)) * mask, {"mask": [mask]}

def restore(output, images):
    return output["image"].clamp(0, 1)
"""


GREY_TASK = '''
"""Grey images behind a mask."""
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks

patch = 16
license = "mit"
base_model = "alice/original"

def build():
    torch.manual_seed(0)
    return ListOfBlocks([Block(Denoiser()) for _ in range(3)])

def measure(images, sigma=0.0):
    return images + sigma / 255 * torch.randn_like(images), torch.ones(1, 1, *images.shape[-2:])

def restore(output, images):
    return output

def noise_level(args):
    return 255 * float(args[0].std())

def schedule(net, sigmas):
    net.sigmas = sigmas
'''


def run(*arguments: object) -> tuple[int, str, str]:
    """The command in a process of its own, as a user runs it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lorun_adapt", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """The same within this process."""
    monkeypatch.setattr(sys, "argv", ["lorun-adapt", *map(str, arguments)])
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def command(capsys, monkeypatch, *arguments: object) -> tuple[int, str]:
    """The exit code of a command and what it prints."""
    monkeypatch.setattr(sys, "argv", ["lorun-adapt", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out + captured.err


def call_quietly(*arguments: object) -> None:
    """The same where there is no test to capture what it prints, as in a fixture that many tests share."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["lorun-adapt", *map(str, arguments)])
        patch.setattr("warnings.showwarning", None)
        cli.main()
    assert not exit_.value.code


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> str:
    """Run a script of ``examples/`` as from a shell, and return what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out
