"""Tensors without a base: the product of their factors is not computed where two thin maps are faster."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversions import all_tensors, relative
from dun_zoo import Case
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorun_adapt
from lorun_adapt.conversion import conversions
from lorun_adapt.network import factored

RANK = 4
FUNCTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "conv1d": ((32, 32, 3), (2, 32, 20), lambda x, w: F.conv1d(x, w, padding=1)),
    "conv2d": ((32, 24, 3, 3), (2, 24, 9, 9), lambda x, w: F.conv2d(x, w, x.new_ones(32), padding="same", dilation=2)),
    "conv2d of one image": ((32, 24, 3, 3), (24, 9, 9), lambda x, w: F.conv2d(x, w, stride=2)),
    "conv2d of channels last": (
        (32, 24, 3, 3),
        (2, 24, 9, 9),
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w),
    ),
    "conv3d": ((32, 32, 3, 3, 3), (2, 32, 5, 5, 5), lambda x, w: F.conv3d(x, w, stride=2)),
    "conv_transpose2d": (
        (24, 32, 3, 3),
        (2, 24, 9, 9),
        lambda x, w: F.conv_transpose2d(x, w, x.new_ones(32), stride=2, padding=1, output_padding=1),
    ),
    "linear": ((32, 48), (2, 7, 48), lambda x, w: F.linear(x, weight=w, bias=x.new_ones(32))),
    "matmul": ((32, 48), (2, 7, 32), lambda x, w: x @ w),
    "matmul on the left": ((32, 48), (48, 7), lambda x, w: torch.matmul(w, x)),
    "matmul of a vector": ((32, 48), (32,), lambda x, w: x.matmul(w)),
}
OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "normalised": ((32, 24, 3, 3), (2, 24, 9, 9), lambda x, w: F.conv2d(x, w / w.norm(), padding=w.shape[-1] // 2)),
    "concatenated": ((32, 24, 3, 3), (2, 24, 9, 9), lambda x, w: F.conv2d(x, torch.cat([w, w]))),
    "grouped": ((32, 12, 3, 3), (2, 24, 9, 9), lambda x, w: F.conv2d(x, w, groups=2)),
    "einsum": ((32, 48), (2, 7, 48), lambda x, w: torch.einsum("bij,kj->bik", x, w)),
    "transposed": ((32, 48), (2, 7, 48), lambda x, w: x @ w.t()),
    "mm by name": ((32, 48), (7, 32), lambda x, w: torch.mm(x, mat2=w)),
    "in 16 bits": ((32, 48), (7, 32), lambda x, w: (x.bfloat16() @ w.bfloat16()).float()),
}


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...], run: Callable[[Tensor, Tensor], Tensor], dense: bool = False) -> None:
        super().__init__()
        columns = torch.Size(shape[1:]).numel()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(RANK, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.randn(shape[0], RANK, generator=generator) / 2)
        self.shape, self.run, self.dense = shape, run, dense

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            return self.run(x, (self.b @ self.a).view(self.shape))
        return self.run(x, factored.factored(self.b, self.a, self.shape))


class Seen(TorchDispatchMode):
    """The shapes of all tensors that arithmetic makes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.append(result.shape)
        return result


def pair(name: str) -> tuple[Layer, Layer, Tensor]:
    shape, size, run = {**FUNCTIONS, **OTHERS}[name]
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return Layer(shape, run), Layer(shape, run, dense=True), x


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_output_and_gradients_are_those_of_the_product(name: str) -> None:
    ours, dense, x = pair(name)
    results = []
    for layer in (ours, dense):
        output = layer(x)
        assert type(output) is Tensor
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, layer.a, layer.b])])
    for mine, expected in zip(*results):
        assert relative(mine, expected) < 1e-5
    with torch.no_grad():
        assert relative(ours(x), results[1][0]) < 1e-5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_product_is_not_computed(name: str) -> None:
    ours, dense, x = pair(name)
    with Seen() as seen, torch.no_grad():
        dense(x)
    product = (len(ours.b), ours.a.shape[1])
    assert product in seen.products
    with Seen() as seen, torch.no_grad():
        ours(x)
    assert product not in seen.products


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "linear", "matmul", "normalised", "concatenated"])
def test_compiled_whole_and_exported(name: str) -> None:
    ours, dense, x = pair(name)
    expected = dense(x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), expected) < 1e-5
    gradients = [torch.autograd.grad(layer(x).square().sum(), [layer.a, layer.b]) for layer in (compiled, dense)]
    assert all(relative(mine, right) < 1e-5 for mine, right in zip(*gradients))
    exported = torch.export.export(ours, (x.detach(),))
    assert relative(exported.module()(x), expected) < 1e-5
    if name in FUNCTIONS:
        sizes = {tuple(node.meta["val"].shape) for node in exported.graph.nodes if node.op == "call_function"}
        assert (len(ours.b), ours.a.shape[1]) not in sizes


class Convolve(torch.autograd.Function):
    """As in code that brings its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(x.shape, w, gradient), torch.nn.grad.conv2d_weight(x, w.shape, gradient)


def test_gradients_of_the_users_own_functions_arrive() -> None:
    ours, dense, x = pair("grouped")
    x = x[:, :12].detach().requires_grad_()
    ours.run = dense.run = Convolve.apply
    results = [torch.autograd.grad(layer(x).square().sum(), [x, layer.a, layer.b]) for layer in (ours, dense)]
    assert all(relative(mine, right) < 1e-5 for mine, right in zip(*results))


def test_gradients_of_torch_func() -> None:
    ours, dense, x = pair("conv2d")
    found = []
    for layer in (ours, dense):
        names = dict(layer.named_parameters())
        found.append(
            torch.func.grad(lambda p, net=layer: torch.func.functional_call(net, p, (x,)).square().sum())(names)
        )
    assert all(relative(found[0][name], found[1][name]) < 1e-5 for name in ("a", "b"))


def test_it_looks_like_the_product() -> None:
    layer, _, _ = pair("conv2d")
    weight, product = factored.factored(layer.b, layer.a, layer.shape), (layer.b @ layer.a).view(layer.shape)
    assert (weight.shape, weight.dtype, weight.device) == (product.shape, product.dtype, product.device)
    assert weight.requires_grad
    assert str(weight.detach()) == str(product.detach())
    assert weight.is_contiguous()
    assert torch.equal(copy.deepcopy(weight.detach()), product)


def test_matrix_units_make_the_product_worth_while() -> None:
    layer, _, x = pair("conv2d")
    with Seen() as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert (len(layer.b), layer.a.shape[1]) in seen.products


def without_bases(net: nn.Module, rank: int = RANK, **find: Any) -> lorun_adapt.LoRunModel:
    names = all_tensors(net, **find)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorun_adapt.LoRunModel(*conversions(net, config, without_base=names, **find))


def test_every_network_computes_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for share in (1e9, -1.0):
        monkeypatch.setattr(factored, "SHARE", share)
        lorun = without_bases(copy.deepcopy(case.net), **case.find())
        output = lorun(*case.inputs)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in lorun.adapters.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (output, gradients), (expected, right) = results
    assert relative(output, expected) < 1e-5
    assert gradients.keys() == right.keys()
    scale = max(float(gradient.norm()) for gradient in right.values())
    assert all(float((gradients[name] - right[name]).norm()) < 1e-4 * scale for name in right)


def test_a_converted_network_uses_its_factors() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(3)])
    lorun = without_bases(net)
    x = torch.rand(1, 32, 8, 8)
    with Seen() as seen, torch.no_grad():
        output = lorun(x)
    assert not seen.products
    assert relative(lorun.merge_and_unload()(x), output) < 1e-5
