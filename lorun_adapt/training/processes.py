"""The processes that ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast as broadcast_tensor
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


def process_state() -> PartialState:
    """Accelerate's view of this process: its number, its device, and how many processes there are."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = PartialState(cpu=_on_cpus())
    if not initialized and state.num_processes > 1:
        # Threads of a process group that is still open when Python exits can abort the process.
        atexit.register(state.destroy_process_group)
    return state


def num_processes() -> int:
    """How many processes train together."""
    return process_state().num_processes if launched() else 1


def make_accelerator() -> Accelerator:
    """An accelerator that leaves modules and batches on the devices where they are."""
    process_state()
    # Some parameters, such as the base's own copy of private tensors, take part in no forward.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(device_placement=False, cpu=_on_cpus(), kwargs_handlers=[unused])


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    if num_processes() == 1:
        return value
    return broadcast_object_list([value])[0]


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of a number; NaN or Inf where any process has that."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, where each process has those of some parameters only."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = [torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in gradients]
    known = torch.tensor([p.grad is not None for p in parameters], dtype=flat[0].dtype, device=flat[0].device)
    *sums, number = accelerator.reduce(torch.cat([*flat, known]), "sum").split([*map(len, flat), len(known)])
    for parameter, gradient, part, processes in zip(parameters, gradients, sums, number.tolist()):
        part = torch.view_as_complex(part.view(-1, 2)) if gradient.is_complex() else part
        parameter.grad = part.view(gradient.shape).to(gradient.dtype, copy=True) if processes else None


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give the tensors the values that they have in the main process."""
    if num_processes() > 1:
        for tensor in tensors:
            tensor.data.copy_(broadcast_tensor(tensor.detach().clone().contiguous()))


def _on_cpus() -> bool:
    """Whether several processes run on CPUs only; accelerate then needs to be asked for CPUs to see them all."""
    return "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
