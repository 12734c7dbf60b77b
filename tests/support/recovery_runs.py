"""Recovery's small teacher, its measurements, and ways to stop a run or to launch it on two processes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks
from safetensors.torch import load_file
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.training.trainer import Trainer

Batch = tuple[Tensor, Tensor]


def teacher(stages: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = ListOfBlocks([Block(Denoiser()) for _ in range(stages)])
    for p in net.parameters():
        p.data.mul_(1.5)
    return net.eval()


def measurements(count: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    return [(torch.rand(4, 1, 8, 8, generator=generator) * mask, mask) for _ in range(count)]


def values(lorun: lorun_adapt.LoRunModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lorun.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(net: nn.Module, original: nn.Module, batch: Batch | None = None) -> float:
    batch = batch or measurements(9)[-1]
    with torch.no_grad():
        return float((net(*batch) - original(*batch)).square().mean())


class Stopping:
    """Batches that stop the run where the ``at``-th is asked for."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(measurements(60)):
            if index == self.at and self.how == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            elif index == self.at:
                raise KeyboardInterrupt
            yield batch


@contextmanager
def interrupted_at_step(at: int) -> Iterator[None]:
    """Within the block, Ctrl-C comes in the ``at``-th step of all runs."""
    steps = itertools.count(1)
    step = Trainer._step

    def stopping(self: Trainer, *arguments: Any) -> float:
        if next(steps) == at:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        yield


def saved_storages(run: Callable[[], object]) -> dict[int, int]:
    """By address, the sizes in bytes of what ``run`` saves for a backward pass."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Whose mean over two batches is that of the batches put together, other than with each one's energy."""
    return 10 * (output - target).square().mean()


def launch(script: str, tmp_path: Path, processes: int = 2) -> dict[str, Tensor]:
    """The tensors that a script on so many processes writes into the file that it is given."""
    (tmp_path / "launched.py").write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(tmp_path / "launched.py"), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,  # processes that disagree wait for each other forever
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "out.safetensors")
