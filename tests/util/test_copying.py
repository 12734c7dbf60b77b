"""Copies of networks whose functions remember them."""

from __future__ import annotations

import functools
import sys
import threading
from types import MethodType
from typing import Any

import pytest
import torch
from dun_zoo import ZOO
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.util.copying import check_separate, copy_network


class Operator:
    """Not a module, but it holds a tensor."""

    __slots__ = ("kernel",)

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel

    def __call__(self) -> Tensor:
        return self.kernel


def counter(layer: nn.Module) -> list[Any]:
    """Two functions that share a variable."""
    calls = 0

    def read() -> Tensor:
        nonlocal calls
        calls += 1
        return layer.weight

    return [read, lambda: (layer.weight, calls)[1]]


def recursive(layer: nn.Module) -> Any:
    def read(depth: int = 2) -> Tensor:
        return read(depth - 1) if depth else layer.weight

    return read


WAYS = {  # how an attribute reads the weight of the layer that has it
    "closure over the layer": lambda d: lambda: d.weight,
    "closure over the parameter": lambda d: (lambda w: lambda: w)(d.weight),
    "default": lambda d: lambda w=d.weight: w,
    "default of a keyword": lambda d: lambda *, w=d.weight: w,
    "partial": lambda d: functools.partial(lambda w: w, d.weight),
    "nested": lambda d: functools.partial(lambda f: f(), lambda: (lambda: d.weight)()),
    "bound to an object": lambda d: Operator(d.weight).__call__,
    "object with slots": lambda d: Operator(d.weight),
    "recursive": recursive,
    "wrapped": lambda d: functools.wraps(d.forward)(lambda: d.weight),
    "bound, with a closure": lambda d: MethodType(lambda self: d.weight, d),
}


@pytest.mark.parametrize("share_tensors", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_functions_read_the_copy(way: str, share_tensors: bool) -> None:
    layer = nn.Linear(1, 1)
    layer.read = WAYS[way](layer)
    copied = copy_network(layer, share_tensors=share_tensors)
    assert copied.read() is copied.weight and layer.read() is layer.weight
    assert (copied.weight is layer.weight) == share_tensors
    replaced = copy_network(layer, replaced={id(layer.weight): layer.bias})
    assert replaced.read() is replaced.weight is layer.bias
    check_separate(layer, copy_network(layer))


def test_in_lists_and_dicts() -> None:
    layer = nn.Linear(1, 1)
    layer.reads = [(lambda: layer.weight,), {"read": lambda: layer.weight}]
    copied = copy_network(layer)
    assert copied.reads[0][0]() is copied.reads[1]["read"]() is copied.weight


def test_functions_that_share_a_variable_still_do() -> None:
    layer = nn.Linear(1, 1)
    layer.reads = counter(layer)
    layer.reads[0]()
    copied = copy_network(layer)
    copied.reads[0](), copied.reads[0]()
    assert (layer.reads[1](), copied.reads[1]()) == (1, 3)


def test_what_a_function_is_stays() -> None:
    layer = nn.Linear(1, 1)

    def read(scale: float = 2.0) -> Tensor:
        """Read it."""
        return scale * layer.weight

    layer.read, layer.plain, read.note = read, torch.relu, lock = read, torch.relu, threading.Lock()
    copied = copy_network(layer)
    assert copied.read is not read and copied.plain is torch.relu
    assert (copied.read.__doc__, copied.read.__name__, copied.read.__annotations__) == (
        "Read it.", "read", read.__annotations__,
    )  # fmt: skip
    assert copied.read.note is lock  # what holds no tensor is not copied, as it might not be copyable
    assert torch.equal(copied.read(), 2 * copied.weight)


def test_hooks_of_a_network_that_collects_features() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.features = {}
    net[0].register_forward_hook(lambda module, args, output: net.features.update(first=output))
    copied = copy_network(net)
    copied(torch.rand(1, 2))
    assert list(copied.features) == ["first"] and not net.features


def test_what_cannot_be_copied_is_an_error() -> None:
    layer = nn.Linear(1, 1)
    layer.state = {"numbers": (i for i in range(3))}
    with pytest.raises(LoRunError, match=r"cannot copy state\['numbers'\] of Linear \(TypeError"):
        copy_network(layer)


NOTEBOOK: nn.Module | None = None  # a global variable, as in a notebook


def test_what_still_reads_the_original_is_an_error(monkeypatch) -> None:
    case = ZOO["remembering"]()
    monkeypatch.setattr(sys.modules[__name__], "NOTEBOOK", case.net)
    for function in (functools.lru_cache(lambda: case.net.kernel), lambda: NOTEBOOK.kernel):
        case.net.operator["more"] = [function]
        with pytest.raises(LoRunError, match=r"operator\['more'\]\[0\].* of Remembering reads the original network"):
            lorun_adapt.convert(case.net, rank=2)
    case.net.operator["more"] = [lambda: globals()["NOTEBOOK"].kernel]  # what no one can see
    assert lorun_adapt.convert(case.net, rank=2)(*case.inputs).shape == case.inputs[0].shape


def test_a_list_of_parameters_beside_the_stages_trains() -> None:
    case = ZOO["remembering"]()
    lorun = lorun_adapt.convert(case.net, rank=2)
    before = lorun(*case.inputs)
    options = {"steps": 3, "loss": lambda output, batch: output.sum(), "held_out": [case.inputs]}
    lorun.finetune([case.inputs], "new", also=["step_*", "kernel"], **options)
    lorun.set_adapter("new")
    new, outside = lorun(*case.inputs), lorun.outside_of("new")
    assert set(outside) == {"step_0", "step_1", "step_2", "kernel"}
    for name, value in outside.items():
        assert not torch.equal(value, case.net.get_parameter(name))
        with torch.no_grad():
            value.add_(0.5)
        assert not torch.equal(lorun(*case.inputs), new), name
        with torch.no_grad():
            value.sub_(0.5)
    lorun.set_adapter("default")
    assert torch.equal(lorun(*case.inputs), before)
