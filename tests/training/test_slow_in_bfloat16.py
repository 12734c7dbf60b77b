"""Convolutions that are slow in bfloat16 run in float32, and networks that are slow in it train in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from dun_zoo import Block, Denoiser, ListOfBlocks
from recovery_runs import measurements
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.training import speed
from lorun_adapt.training.slow_in_bfloat16 import SlowInFloat32

BLOCK = 20


@contextmanager
def in_bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), SlowInFloat32():
        yield


@pytest.mark.parametrize(
    "layer, shape, dtype",
    [
        (nn.Conv2d(1, 4, 32, stride=32), (1, 1, 64, 64), torch.float32),
        (nn.Conv2d(1, 4, 32), (1, 1, 64, 64), torch.bfloat16),
        (nn.Conv2d(2, 4, 4, stride=2), (1, 2, 64, 64), torch.bfloat16),
        (nn.Conv2d(1, 4, (1, 32), stride=(1, 32)), (1, 1, 64, 64), torch.float32),
        (nn.Conv2d(1, 4, (32, 1), stride=(1, 2)), (1, 1, 64, 64), torch.bfloat16),
        (nn.ConvTranspose2d(4, 1, 32, stride=32), (1, 4, 2, 2), torch.float32),
        (nn.ConvTranspose2d(4, 2, 2, stride=2), (1, 4, 8, 8), torch.bfloat16),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 16, 16), torch.float32),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 16, 16), torch.bfloat16),
        (nn.Conv2d(8, 8, 5, padding=2, groups=2), (1, 8, 16, 16), torch.bfloat16),
        (nn.ConvTranspose2d(8, 8, 5, padding=2, groups=8), (1, 8, 16, 16), torch.float32),
        (nn.ConvTranspose2d(8, 2, 5, padding=2, groups=2), (1, 8, 16, 16), torch.bfloat16),
        (nn.Conv1d(1, 4, 32, stride=32), (1, 1, 64), torch.float32),
        (nn.Conv3d(1, 4, 3), (1, 1, 8, 8, 8), torch.bfloat16),
    ],
    ids=repr,
)
def test_which_run_in_float32(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with in_bfloat16():
        assert layer(torch.rand(shape)).dtype == dtype


def test_all_ways_to_call_them() -> None:
    images, blocks, bias = torch.rand(1, 1, 64, 64), torch.rand(8, 1, 32, 32), torch.zeros(8)
    expected = F.conv2d(images, blocks, bias, 32)
    with in_bfloat16():
        calls = [
            F.conv2d(images, blocks, bias, 32),
            F.conv2d(images, weight=blocks, stride=(32, 32)),
            torch.conv2d(input=images, weight=blocks, stride=[32, 32], groups=1),
            F.conv2d(images.bfloat16().float(), blocks, None, 32, 0, 1, 1),
        ]
        assert F.conv2d(images.bfloat16(), blocks.bfloat16(), stride=32).dtype == torch.float32
    assert all(torch.equal(call, expected) for call in calls[:3])
    assert torch.allclose(calls[3], expected, rtol=0.01)


def test_a_stride_for_all_sides_attention_and_blocks_without_autocast() -> None:
    images, wide, query = torch.rand(1, 1, 64, 64), torch.rand(8, 1, 4, 32), torch.rand(1, 2, 8, 4)
    with in_bfloat16():
        assert F.conv2d(images, wide, stride=[32]).dtype == torch.float32
        assert F.scaled_dot_product_attention(query, query, query).dtype == torch.float32
        assert F.conv2d(images.half(), wide.half(), stride=32).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert F.conv2d(images.bfloat16(), wide.bfloat16(), stride=32).dtype == torch.bfloat16


def test_other_threads_run_as_they_did() -> None:
    with in_bfloat16(), ThreadPoolExecutor(1) as threads:
        assert not isinstance(threads.submit(SlowInFloat32.again).result(), SlowInFloat32)
        assert isinstance(SlowInFloat32.again(), SlowInFloat32)


def test_gradients_are_those_of_float32() -> None:
    images, blocks = torch.rand(1, 1, 64, 64, requires_grad=True), torch.rand(8, 1, 32, 32, requires_grad=True)
    exact = torch.autograd.grad(F.conv2d(images, blocks, stride=32).square().sum(), (images, blocks))
    with in_bfloat16():
        loss = F.conv2d(images, blocks, stride=32).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(loss, (images, blocks)), exact))


class Measured(Block):
    """The gradient step is one with blocks of pixels."""

    def __init__(self) -> None:
        super().__init__(Denoiser())
        self.register_buffer("blocks", torch.linalg.qr(torch.randn(64, 64))[0][:32].reshape(32, 1, 8, 8))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        blocks = self.get_buffer("blocks").repeat(1, 1, 3, 3)[:, :, :BLOCK, :BLOCK]
        enlarged = F.interpolate(x, size=BLOCK)
        measured = F.conv2d(enlarged, blocks, stride=BLOCK)
        residual = F.conv_transpose2d(measured - F.conv2d(F.interpolate(y, size=BLOCK), blocks, stride=BLOCK), blocks)
        return super().forward(x - 0.01 * F.interpolate(residual, size=x.shape[-1]), y, mask)


def network() -> nn.Module:
    torch.manual_seed(0)
    return ListOfBlocks([Measured() for _ in range(3)]).eval()


@pytest.mark.parametrize("recompute", [False, True])
def test_networks_with_such_convolutions_train_in_bfloat16(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_multiplies_in_bfloat16", lambda: True)
    monkeypatch.setattr(speed, "LONGER", float("inf"))
    seen: list[torch.dtype] = []
    forward = Measured.forward

    def watched(self: Measured, *arguments: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            blocks = torch.rand(2, 1, BLOCK, BLOCK)
            seen.append(F.conv2d(torch.rand(1, 1, BLOCK, BLOCK), blocks, stride=BLOCK).dtype)
        return forward(self, *arguments)

    monkeypatch.setattr(Measured, "forward", watched)
    net = network()
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.recover(net, measurements(), steps=25, recompute=recompute)
    assert seen and set(seen) == {torch.float32}


@pytest.mark.parametrize(
    "seconds, used",
    [
        ([1.0, 1.0], True),
        ([3.9, 1.0], True),
        ([9.0, 1.0, 0.5], True),  # only the first step was slow
        ([9.0, 1.0, 8.0, 2.0], True),
        ([9.0, 1.0, 5.0, 7.0], False),
        ([0.09, 0.01], True),  # too short to tell
    ],
)
def test_networks_that_are_slow_in_bfloat16_train_in_float32(
    seconds: list[float], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_multiplies_in_bfloat16", lambda: True)
    step, bfloat16, left = speed._seconds_of_step, [], iter(seconds)

    def timed(*arguments: object) -> float:
        if not torch.is_autocast_enabled("cpu") and not bfloat16:  # the choice of the memory format
            return step(*arguments)
        bfloat16.append(torch.is_autocast_enabled("cpu"))
        step(*arguments)
        return next(left)

    monkeypatch.setattr(speed, "_seconds_of_step", timed)
    precisions: set[bool] = set()
    whole = speed.bfloat16
    monkeypatch.setattr("lorun_adapt.training.trainer.bfloat16", lambda on: (precisions.add(on), whole(on))[1])
    net = network()
    lorun_adapt.convert(net, rank=1).recover(net, measurements(), steps=4)
    assert (True in precisions) is used and bfloat16 == [True, False, True, True][: len(seconds)]


def test_so_do_they_in_launched_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    images, blocks = torch.rand(1, 1, 64, 64), torch.rand(8, 1, 32, 32)

    def dtype() -> torch.dtype:
        with speed.bfloat16(False), torch.autocast("cpu", dtype=torch.bfloat16):  # as --mixed_precision bf16 does
            return F.conv2d(images, blocks, stride=32).dtype

    assert dtype() == torch.bfloat16
    monkeypatch.setattr(speed, "launched", lambda: True)
    assert dtype() == torch.float32
