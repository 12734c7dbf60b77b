"""Converted networks that tests of several folders start from."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from dun_zoo import Case
from peft import LoraConfig
from torch import Tensor, nn

import lorun_adapt

FULL = 10_000  # above any rank: clamped to the tensor's limit
SET = "adapters/default"  # the first set's folder within a saved conversion


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


def floats_of(network: nn.Module) -> list[Tensor]:
    """The parameters and buffers that may be changed at will; indices may not."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


def train_a_bit(lorun: lorun_adapt.LoRunModel, inputs: tuple[Any, ...], steps: int = 2) -> None:
    """Move all adapters away from where they started."""
    optimizer = torch.optim.Adam([p for p in lorun.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (lorun(*inputs) - 0.5).square().sum().backward()
        optimizer.step()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
