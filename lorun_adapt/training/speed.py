"""How a CPU runs the networks fastest while they train: convolutions channels last, and in bfloat16.

Which networks run so is tried, not known: some views of activations need another order of dimensions,
and some operations, such as making complex numbers, know no bfloat16. What is chosen depends on nothing but the
networks and the CPU, so that runs repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..network.batches import Batch
from .distill import Distillation, psnr_to
from .processes import launched
from .supervised import Supervised

MARGIN = 5.0  # dB: how far the student's PSNR to the teacher must be below what rounding leaves of the teacher


@contextmanager
def channels_last(distillation: Distillation | Supervised, batch: Batch, seed: int) -> Iterator[None]:
    """Within the block, hold the convolutions' weights channels last if both networks run so on ``batch``.

    Afterwards the parameters have the storage that they had, with the values that they have.
    """
    networks = (distillation.teacher, distillation.student)
    found = {id(p): p for network in networks for p in network.parameters() if p.ndim == 4 and p.is_contiguous()}
    uses = Counter(p.data_ptr() for p in found.values())
    moved = {
        p: p.data
        for p in found.values()
        if p.device.type == "cpu" and p.dtype == torch.float32 and uses[p.data_ptr()] == 1
    }

    def restore_interrupted_save() -> None:
        for parameter, before in moved.items():
            if parameter.data_ptr() != before.data_ptr():
                before.copy_(parameter.data)
                parameter.data = before

    try:
        for parameter, before in moved.items():
            parameter.data = before.contiguous(memory_format=torch.channels_last)
        if moved and not _runs(distillation, batch, seed):
            restore_interrupted_save()
        yield
    finally:
        restore_interrupted_save()


def bfloat16(enabled: bool) -> AbstractContextManager[None]:
    """What a forward and its loss stand in to run in bfloat16."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else nullcontext()


def runs_in_bfloat16(distillation: Distillation | Supervised, batch: Batch, seed: int) -> bool:
    """Whether this CPU multiplies faster in bfloat16, and the networks run in it.

    Not where ``accelerate launch`` has said what is wanted.
    """
    networks = (distillation.teacher, distillation.student)
    held = [p for network in networks for p in network.parameters()]
    if launched() or not _multiplies_in_bfloat16() or any(p.device.type != "cpu" for p in held):
        return False
    if any(p.dtype in (torch.float64, torch.complex128) for p in held):
        return False
    with bfloat16(True):
        return _runs(distillation, batch, seed)


def rounding_psnr(distillation: Distillation | Supervised, batch: Batch, seed: int) -> float:
    """The PSNR in dB of the teacher's output in bfloat16 to what it is in its own precision."""
    observer, teacher = distillation.observer, distillation.teacher
    with torch.no_grad():
        target = observer.run(teacher, batch, seed).final
        with bfloat16(True):
            rounded = observer.run(teacher, batch, seed).final
    return float(psnr_to(rounded, target))


def _runs(distillation: Distillation | Supervised, batch: Batch, seed: int) -> bool:
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
