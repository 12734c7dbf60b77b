"""How a CPU runs the networks fastest while they train: convolutions channels last, and in bfloat16.

Which networks run so is tried, not known: some views of activations need another order of dimensions,
and Fourier transforms and solvers know no bfloat16. What is chosen depends on nothing but the networks
and the CPU, so that runs repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .calibration import Batch
from .distill import Distillation, relative_error
from .processes import launched

NOISE = 0.1  # of the student's error: what rounding may add to it


@contextmanager
def channels_last(distillation: Distillation, batch: Batch, seed: int) -> Iterator[None]:
    """Within the block, hold the convolutions' weights channels last if both networks run so on ``batch``.

    Afterwards the parameters have the storage that they had, with the values that they have.
    """
    networks = (distillation.teacher, distillation.student)
    found = {id(p): p for network in networks for p in network.parameters() if p.ndim == 4 and p.device.type == "cpu"}
    uses = Counter(p.data_ptr() for p in found.values())
    moved = {p: p.data for p in found.values() if p.is_contiguous() and uses[p.data_ptr()] == 1}

    def put_back() -> None:
        while moved:
            parameter, before = moved.popitem()
            before.copy_(parameter.data)
            parameter.data = before

    try:
        for parameter, before in moved.items():
            parameter.data = before.contiguous(memory_format=torch.channels_last)
        if moved and not _runs(distillation, batch, seed):
            put_back()
        yield
    finally:
        put_back()


def bfloat16(enabled: bool) -> torch.autocast:
    """What a forward and its loss stand in to run in bfloat16."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def gains_from_bfloat16(distillation: Distillation, batch: Batch, seed: int) -> bool:
    """Whether to run ``distillation`` in bfloat16, tried on one batch.

    Not on other devices, nor where ``accelerate launch`` has said what is wanted, nor where the networks
    are so near to each other that rounding would hide what is left between them.
    """
    networks = teacher, student = distillation.teacher, distillation.student
    plain = all(p.device.type == "cpu" and p.dtype != torch.float64 for net in networks for p in net.parameters())
    if launched() or not plain or not _multiplies_in_bfloat16():
        return False

    def final(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.float() for tensor in distillation.observer.run(network, batch, seed).final]

    with bfloat16(True):
        if not _runs(distillation, batch, seed):
            return False
        rounded = final(teacher)
    target, own = final(teacher), final(student)
    return all(bool(relative_error(a, c) <= NOISE * relative_error(b, c)) for a, b, c in zip(rounded, own, target))


def _runs(distillation: Distillation, batch: Batch, seed: int) -> bool:
    """Whether a forward and a backward go through as things are."""
    try:
        distillation(lambda: batch, seed)[0].backward()
    except Exception:  # whatever a forward raises that meets what it does not expect
        return False
    finally:
        for parameter in distillation.student.parameters():
            parameter.grad = None
    return True


def _multiplies_in_bfloat16() -> bool:
    """Whether this CPU has Intel's matrix units (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
