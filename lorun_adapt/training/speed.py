"""Run the networks as fast as a CPU can while they train: convolutions channels last, and in bfloat16.

Whether a network runs so is found by trying: some forwards view activations in a way that needs another
order of dimensions, and some operations, such as making complex numbers, do not support bfloat16, or
are much slower in it. The choice depends on the networks and the CPU alone, so that runs repeat.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..network.batches import Batch
from ..network.eight_bits import EightBits
from .distill import Distillation, Example, psnr_to
from .processes import launched
from .slow_in_bfloat16 import SlowInFloat32
from .supervised import Supervised

# bfloat16 is used while the student's PSNR to the teacher is this much (dB) below the teacher's own in bfloat16.
MARGIN = 5.0
# bfloat16 is not used if the shortest of so many steps takes so many times as long in it, and so many seconds. That is
# far more than times vary by, so that each run chooses the same.
STEPS, LONGER, LONG = 3, 4.0, 0.1


@contextmanager
def channels_last(objective: Distillation | Supervised, batch: Batch, seed: int) -> Iterator[None]:
    """Within the block, hold the convolutions' weights channels last if the networks run so on ``batch``.

    Afterwards the parameters are back in their original storage, with the values they have then.
    """
    kernels = {
        id(p): p
        for network in objective.networks
        for p in network.parameters()
        if p.ndim == 4 and p.is_contiguous() and not isinstance(p, EightBits)
    }
    uses = Counter(p.data_ptr() for p in kernels.values())
    moved = {
        p: p.data
        for p in kernels.values()
        if p.device.type == "cpu" and p.dtype == torch.float32 and uses[p.data_ptr()] == 1
    }

    def move_back() -> None:
        for parameter, before in moved.items():
            if parameter.data_ptr() != before.data_ptr():
                before.copy_(parameter.data)
                parameter.data = before

    try:
        for parameter, before in moved.items():
            parameter.data = before.contiguous(memory_format=torch.channels_last)
        if moved and math.isinf(_seconds_of_step(objective, batch, seed)):
            move_back()
        yield
    finally:
        move_back()


@contextmanager
def bfloat16(enabled: bool) -> Iterator[None]:
    """Run the block in bfloat16, if ``enabled``: a forward and its loss.

    Under ``accelerate launch``, whose option decides, it is not enabled, but the block may run in bfloat16 too.
    """
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if enabled or launched():
            stack.enter_context(SlowInFloat32())
        yield


def runs_in_bfloat16(objective: Distillation | Supervised, batch: Batch, seed: int) -> bool:
    """Whether this CPU multiplies faster in bfloat16, and the networks run in it, and not far more slowly.

    False under ``accelerate launch``, whose own option sets the precision.
    """
    parameters = [p for network in objective.networks for p in network.parameters()]
    if launched() or not _multiplies_in_bfloat16() or any(p.device.type != "cpu" for p in parameters):
        return False
    if any(p.dtype in (torch.float64, torch.complex128) for p in parameters):
        return False
    with bfloat16(True):
        seconds = _seconds_of_step(objective, batch, seed)  # the first step prepares much that later ones need not
        if math.isinf(seconds) or not _runs_without_gradients(objective, batch, seed):
            return False
    longest = max(LONG, LONGER * _seconds_of_step(objective, batch, seed))
    steps = 1
    while seconds > longest and steps < STEPS:
        with bfloat16(True):
            seconds, steps = min(seconds, _seconds_of_step(objective, batch, seed)), steps + 1
    return seconds <= longest


def rounding_psnr(objective: Distillation | Supervised, example: Example) -> float:
    """PSNR in dB of the reference's output in bfloat16 to its output in its own precision."""
    observer, reference, (batch, seed, target) = objective.observer, objective.reference, example
    with torch.no_grad():
        target = target or observer.run(reference, batch, seed)
        with bfloat16(True):
            rounded = observer.run(reference, batch, seed)
    return float(psnr_to(rounded.final, target.final))


def _seconds_of_step(objective: Distillation | Supervised, batch: Batch, seed: int) -> float:
    """What a forward and a backward take in the current memory format and precision; inf if they fail."""
    started = time.perf_counter()
    gradients = [(parameter, parameter.grad) for parameter in objective.student.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        objective(lambda: objective.example(batch, seed))[0].backward()
    except Exception:  # an operation that doesn't support them may raise anything
        return math.inf
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return time.perf_counter() - started


@torch.no_grad()
def _runs_without_gradients(objective: Distillation | Supervised, batch: Batch, seed: int) -> bool:
    """Whether the reference runs without gradients, where torch takes other ways through some layers."""
    try:
        objective.observer.run(objective.reference, batch, seed)
    except Exception:
        return False
    return True


def _multiplies_in_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16: AMX, or those of AVX-512."""
    asked = (getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(has() for has in asked)
