"""Copies of what is plain in a network are what ``copy.deepcopy`` makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from dun_zoo import ZOO
from torch import Tensor, nn
from torch.nn import functional

from lorun_adapt.util.plain_copy import copy_plain, copy_rest


def same(first: Any, second: Any, pairs: dict[int, int]) -> bool:
    """Whether two values are equal, and refer to themselves at the same places."""
    if type(first) is not type(second):
        return False
    if isinstance(first, MethodType):
        return first.__func__ is second.__func__ and same(first.__self__, second.__self__, pairs)
    if isinstance(first, partial):
        return same((first.func, first.args, first.keywords), (second.func, second.args, second.keywords), pairs)
    if not isinstance(first, (Tensor, nn.Module, dict, list, set)):
        if isinstance(first, tuple):
            return len(first) == len(second) and all(same(a, b, pairs) for a, b in zip(first, second))
        return bool(first == second)
    if id(first) in pairs:
        return pairs[id(first)] == id(second)
    pairs[id(first)] = id(second)
    if isinstance(first, Tensor):
        return torch.equal(first, second) and first.requires_grad == second.requires_grad
    if isinstance(first, nn.Module):
        return same(vars(first), vars(second), pairs)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(a, b, pairs) for a, b in zip(first.values(), second.values()))
    if isinstance(first, set):
        return first == second
    return len(first) == len(second) and all(same(a, b, pairs) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ZOO)
def test_same_as_deepcopy(name: str) -> None:
    network = ZOO[name]().net
    memo: dict[int, Any] = {}
    copy_rest(copy_plain(network, memo), memo)
    assert same(memo[id(network)], copy.deepcopy(network), {})
    copied = {id(module) for module in memo[id(network)].modules()}
    assert not copied & {id(module) for module in network.modules()}


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.activation: Callable[[Tensor], Tensor] = functional.relu
        self.log: list[Any] = []
        self.settings = {"scales": [1, 2], "size": (3, 4), "mean": torch.zeros(2)}


def test_plain_layers_are_copied_whole_and_share_what_they_shared() -> None:
    network = nn.Sequential(Layer(), Layer(), nn.MultiheadAttention(2, 1), nn.BatchNorm2d(2))
    network[1].log = network[0].log
    network[1].settings["scales"] = network[0].settings["scales"]
    network[1].weight = network[0].weight
    network[0].settings["of"] = network[0].weight
    memo: dict[int, Any] = {}
    assert copy_plain(network, memo) == []
    copied = memo[id(network)]
    first, second = copied[0], copied[1]
    assert first.log is second.log and first.log is not network[0].log
    assert first.settings["scales"] is second.settings["scales"]
    assert first.weight is second.weight is first.settings["of"]
    assert first.settings["mean"] is not network[0].settings["mean"]
    assert first.activation is functional.relu


def test_what_is_not_plain_is_left() -> None:
    layer = Layer()
    hidden = Layer()
    layer.settings["hidden"] = hidden
    layer.recent = {"all": [hidden.weight, object()]}
    layer.twice = lambda: 2 * layer.weight
    graph = layer.weight * 2
    layer.product = graph
    memo: dict[int, Any] = {}
    left = copy_plain(layer, memo)
    assert [part.name for part in left] == ["settings", "recent", "twice"]
    assert id(layer.settings) not in memo, "half of a container must not stay in the memo"
    assert id(layer.settings["scales"]) not in memo
    copied = memo[id(layer)]
    assert list(vars(copied)) == list(vars(layer))
    assert copied.product is not graph and copied.product.is_leaf and torch.equal(copied.product, graph)
    copy_rest(left, memo)
    assert copied.settings["hidden"] is not hidden
    assert copied.recent["all"][0] is copied.settings["hidden"].weight


class WithOwnCode(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> WithOwnCode:
        return self


def test_modules_that_copy_themselves_do() -> None:
    network = nn.Sequential(Layer(), WithOwnCode(1, 1))
    memo: dict[int, Any] = {}
    left = copy_plain(network, memo)
    assert [part.name for part in left] == ["_modules"]
    copy_rest(left, memo)
    copied = memo[id(network)]
    assert copied[1] is network[1] and copied[0] is memo[id(network[0])]
