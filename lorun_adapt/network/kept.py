"""Notice stages that keep what they have computed from their weights, since adapters change the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import StageMap
from ..util.copying import copy_network
from ..util.modules import evaluating
from ..util.nested import device_of, to_device
from ..util.seeds import seeded

CHANGE = 0.01  # of each weight, at most, to see what depends on it


def check_nothing_is_kept(dun: nn.Module, stage_map: StageMap, inputs: Sequence[Any]) -> None:
    """Check that no stage keeps a tensor from one forward to the next that it has computed from its weights.

    A kernel that is normalised once and then kept would stay that of the original, whatever adapters run. What only
    depends on the size of the image, such as a mask of windows, may be kept.

    Args:
        dun: the original network; a copy of it runs.
        stage_map: its stages.
        inputs: the arguments of one forward; if the network cannot run on them, nothing is checked.

    Raises:
        LoRunError: a stage keeps such a tensor in an attribute.
    """
    network = copy_network(dun)
    run = _runner(network, inputs)
    if not run():
        return
    paths = dict.fromkeys(site.module for group in stage_map.groups for site in group.sites)
    stages = [network.get_submodule(path) for path in paths]
    modules = {id(module): module for stage in stages for module in stage.modules()}.values()
    for name in sorted({name for module in modules for name, value in vars(module).items() if _is_kept(value)}):
        owners = [module for module in modules if _is_kept(vars(module).get(name))]
        if _is_of_the_weights(name, owners, [p for stage in stages for p in stage.parameters()], run):
            raise LoRunError(
                f"the {type(owners[0]).__name__} of {stage_map.network} keeps {name}, computed from its weights, from "
                "one forward to the next, and adapters change the weights: have it computed in each forward"
            )


def _is_kept(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()


def _runner(network: nn.Module, inputs: Sequence[Any]) -> Callable[[], bool]:
    """A function that runs the network once, always on the same, and returns whether it could."""

    def run() -> bool:
        try:
            with torch.no_grad(), evaluating(network), seeded(0):
                network(*to_device(tuple(inputs), device_of(network)))
        except Exception:  # the user's code may raise anything
            return False
        return True

    return run


@torch.no_grad()
def _is_of_the_weights(
    name: str, owners: Sequence[nn.Module], weights: Sequence[Tensor], run: Callable[[], bool]
) -> bool:
    """Whether an attribute outlasts a forward, is computed anew where it is missing, and then follows the weights."""
    before = [vars(owner)[name] for owner in owners]
    if not run() or all(vars(owner).get(name) is not value for owner, value in zip(owners, before)):
        return False
    for forgotten in ({}, {name: None}):  # forwards ask whether there is one, or whether it is None
        found: list[list[Any]] = []
        for change in (0.0, CHANGE):
            values = [weight.clone() for weight in weights]
            with seeded(0):
                for weight in weights:
                    if weight.is_floating_point() or weight.is_complex():
                        weight.mul_(1 + change * torch.rand(weight.shape, device=weight.device))
            for owner in owners:
                owner.__dict__.pop(name, None)
                owner.__dict__.update(forgotten)
            could = run()
            found.append([vars(owner).get(name) for owner in owners] if could else [])
            for weight, value in zip(weights, values):
                weight.copy_(value)
        for owner, value in zip(owners, before):
            owner.__dict__[name] = value
        pairs = [(a, b) for a, b in zip(*found) if isinstance(a, Tensor) and isinstance(b, Tensor)]
        if pairs:
            return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    return False
