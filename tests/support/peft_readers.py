"""Denoisers whose code reads a layer's weight past the layer, or asks what the layer is, in many ways."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from dun_zoo import Denoiser
from torch import Tensor, nn


class Around(Denoiser):
    """A denoiser that leaves to its subclass how the middle layer is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Conv2d(8, 1, 3, padding=1)

    def layer(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.tail(F.relu(self.layer(F.relu(self.head(x)))))


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


class ByName(Around):
    def layer(self, x: Tensor) -> Tensor:
        return F.conv2d(x, getattr(self.body, "weight"), padding=1)  # noqa: B009


class Property(Around):
    @property
    def kernel(self) -> Tensor:
        return self.body.weight

    def layer(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


class Static(Around):
    @staticmethod
    def apply(layer: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, padding=1)

    def layer(self, x: Tensor) -> Tensor:
        return self.apply(self.body, x)


class PartOfAMethod(Around):
    def _apply_padded(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self.body.weight, padding=padding)

    layer = functools.partialmethod(_apply_padded, padding=1)  # type: ignore[assignment]


class FromAModule(Around):
    def layer(self, x: Tensor) -> Tensor:
        import peft_readers

        return peft_readers.apply(self.body, x)


class Parent(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.tail(F.conv2d(F.relu(self.head(x)), self.body.weight, padding=1))


class Child(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return function(self, function(self, x))

    return wrapper


class Decorated(Around):
    @twice
    def layer(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.body.weight, padding=1)


class OwnForward(Around):
    def __init__(self) -> None:
        super().__init__()
        self.op = apply

    def layer(self, x: Tensor) -> Tensor:
        return self.op(self.body, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, layer: nn.Module) -> Tensor:
        return F.conv2d(x, layer.weight.detach(), padding=1)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class OwnGradient(Around):
    def layer(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.body)


class AsksForTheClass(Around):
    def layer(self, x: Tensor) -> Tensor:
        for module in (self.body,):
            x = F.relu(module(x)) if isinstance(module, nn.Conv2d) else module(x)
        return x


class ReadsAnAttribute(Around):
    def layer(self, x: Tensor) -> Tensor:
        return self.body(x) / self.body.out_channels


class Hooked(Around):
    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(_hook)


def _hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return F.relu(output)


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, self.weight, padding=1))


class LayerWithAForward(Around):
    def __init__(self) -> None:
        super().__init__()
        self.body.forward = types.MethodType(_forward, self.body)


class OwnLayerThatIsRead(Around):
    """The layer that is read is the stage's own, and its name ends another's."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead, self.head = self.head, nn.Conv2d(8, 1, 1)
        del self.tail

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * F.conv2d(self.body(F.relu(self.ahead(x))), self.head.weight, self.head.bias)


READERS = [
    ByName,
    Property,
    Static,
    PartOfAMethod,
    FromAModule,
    Child,
    Decorated,
    OwnForward,
    OwnGradient,
    AsksForTheClass,
    ReadsAnAttribute,
    Hooked,
    LayerWithAForward,
    OwnLayerThatIsRead,
]
