"""Whether to train in bfloat16: on CPUs that multiply in it several times faster, networks that run in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calibration import Batch
from .distill import Distillation, relative_error
from .processes import launched

NOISE = 0.1  # of the student's error: what rounding may add to it


def bfloat16(enabled: bool) -> torch.autocast:
    """What a forward and its loss stand in to run in bfloat16 where that is safe."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def gains_from_bfloat16(distillation: Distillation, batch: Batch, seed: int) -> bool:
    """Whether to run ``distillation`` so, tried on one batch.

    It is not done on other devices, nor where ``accelerate launch`` has said what is wanted; nor where the
    networks have operations without bfloat16 (Fourier transforms, solvers), or are so near to each
    other that rounding would hide what is left between them.
    """
    teacher, student = distillation.teacher, distillation.student
    if launched() or not _multiplies_in_bfloat16() or not all(map(_is_plain, (teacher, student))):
        return False

    def final(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.float() for tensor in distillation.observer.run(network, batch, seed).final]

    try:
        target, own = final(teacher), final(student)
        with bfloat16(True):
            rounded = final(teacher)
            loss = distillation(lambda: batch, seed)[0]
        loss.backward()
    except Exception:  # whatever a forward raises that meets a dtype it does not know
        return False
    finally:
        for parameter in student.parameters():
            parameter.grad = None
    return all(bool(relative_error(a, c) <= NOISE * relative_error(b, c)) for a, b, c in zip(rounded, own, target))


def _multiplies_in_bfloat16() -> bool:
    """Whether this CPU has Intel's matrix units (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _is_plain(network: nn.Module) -> bool:
    return all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.complex64) for p in network.parameters())
