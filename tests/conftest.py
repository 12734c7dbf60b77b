from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dun_zoo import ZOO, Case
from hub_server import HubServer
from peft import LoraConfig
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.training import speed

FULL = 10_000  # above any rank: clamped to the tensor's limit


@pytest.fixture(autouse=True)
def _same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(speed, "_multiplies_in_bfloat16", lambda: False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback, for this process, with the accounts alice and bob."""
    with HubServer() as server:
        server.tokens.update({"alice-token": "alice", "bob-token": "bob"})
        server.redirect_client(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    return ZOO[request.param]()


@pytest.fixture
def blocks() -> Case:
    return ZOO["list_of_blocks"]()


@pytest.fixture
def lorun(blocks: Case) -> lorun_adapt.LoRunModel:
    """``blocks``, converted and trained away from where it started."""
    lorun = lorun_adapt.convert(blocks.net, rank=2)
    train_a_bit(lorun, blocks.inputs)
    return lorun


def all_tensors(net: nn.Module, **find: Any) -> list[str]:
    """Every tensor that can have a low-rank term, by name relative to the denoiser."""
    groups = lorun_adapt.find_stages(net, **find).groups
    return [spec.name for group in groups for spec in group.tensors if spec.adaptable]


def convert_fully(case: Case, rank: int = FULL) -> lorun_adapt.LoRunModel:
    """Every tensor adapted by name."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=all_tensors(case.net, **case.find()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorun_adapt.convert(case.net, config, **case.find())


def train_a_bit(lorun: lorun_adapt.LoRunModel, inputs: tuple[Any, ...], steps: int = 2) -> None:
    """Move all adapters away from where they started."""
    optimizer = torch.optim.Adam([p for p in lorun.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (lorun(*inputs) - 0.5).square().sum().backward()
        optimizer.step()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
