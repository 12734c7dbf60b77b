"""The processes that ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

import atexit
import os
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list

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


def make_accelerator() -> Accelerator:
    """An accelerator that leaves modules and batches on the devices where they are."""
    # Some parameters, such as the base's own copy of private tensors, take part in no forward.
    process_state()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(device_placement=False, cpu=_on_cpus(), kwargs_handlers=[unused])


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    if not launched() or process_state().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _on_cpus() -> bool:
    """Whether several processes run on CPUs only; accelerate then needs to be asked for CPUs to see them all."""
    return "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
