"""Weights that stay in eight bits in memory, and become floating-point numbers in each operation that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..disk.eight_bits import dequantised, quantised, rounded
from ..errors import LoRunError
from ..stages.tensors import base_tensors, outside_parameters
from ..util.copying import copy_network, deep_copy
from ..util.modules import buffer_names, has_valid_values
from .adapter import StageAdapter
from .converted import AdapterSet, Converted

aten = torch.ops.aten


class EightBits(Tensor):
    """A frozen tensor of whole numbers from -127 to 127, with a scale for each row or column.

    It looks like a floating-point tensor, and every operation reads it as one. So its views are copies: what is written
    to them is lost. Pickle stores it as an ordinary tensor.

    Args:
        numbers: the whole numbers, int8, in the shape of the tensor.
        scales: they broadcast to this shape.
        dtype: what an operation sees.

    >>> weight = EightBits(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]), torch.float32)
    >>> weight + 1, weight.nbytes, weight.dtype
    (tensor([[ 2., -1.]]), 6, torch.float32)
    """

    numbers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> EightBits:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=dtype, device=numbers.device)

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.numbers, self.scales = numbers, scales

    def float_values(self) -> Tensor:
        """Return the tensor as an ordinary one."""
        return dequantised(self.numbers, self.scales, self.dtype)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The number of bytes in memory, with the scales."""
        return self.numbers.nbytes + self.scales.nbytes

    def requires_grad_(self, requires_grad: bool = True) -> EightBits:
        """Stay frozen: a step would be lost in the rounding."""
        return self

    def share_memory_(self) -> EightBits:
        """Move the numbers to memory that processes share."""
        self.numbers.share_memory_()
        self.scales.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share the numbers."""
        return self.numbers.is_shared()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.float_values().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"EightBits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def _stable_hash_for_caching(self) -> str:
        """Return what compiled code depends on, for the caches of ``torch.compile``."""
        return f"EightBits {tuple(self.shape)} {tuple(self.scales.shape)} {self.dtype} {self.device}"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Return the names of the tensors within, and what else makes this one: for ``torch.compile``."""
        return ["numbers", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]
    ) -> EightBits:
        """Undo ``__tensor_flatten__``."""
        return EightBits(inner["numbers"], inner["scales"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (kept := KEEP.get(func)) is not None and isinstance(args[0], EightBits):
            return kept(*args, **kwargs)
        if func._schema.is_mutable and any(isinstance(value, EightBits) for value in _written(func, args, kwargs)):
            raise LoRunError(f"{func} cannot change weights in eight bits: do that before int8(), or without it")
        return func(*map(_read, args), **{name: _read(value) for name, value in kwargs.items()})


def _read(value: Any) -> Any:
    """An argument of an operation, with ordinary tensors in the place of those in eight bits."""
    if isinstance(value, EightBits):
        return value.float_values()
    return [_read(item) for item in value] if type(value) in (list, tuple) else value


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation changes."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | dict(kwargs)
    return [
        given.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _detach(tensor: EightBits) -> EightBits:
    return EightBits(tensor.numbers, tensor.scales, tensor.dtype)


def _clone(tensor: EightBits, **_: Any) -> EightBits:
    return EightBits(tensor.numbers.clone(), tensor.scales.clone(), tensor.dtype)


def _to(
    tensor: EightBits, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> EightBits:
    dtype = dtype or tensor.dtype
    if not dtype.is_floating_point:
        raise LoRunError(f"weights in eight bits stand for floating-point numbers, and cannot become {dtype}")
    numbers, scales = (part.to(device, copy=True) for part in (tensor.numbers, tensor.scales))
    return EightBits(numbers, scales, dtype)


def _copy_to(tensor: EightBits, source: Tensor, non_blocking: bool = False) -> EightBits:
    """Round other values to eight bits, in the place of these."""
    if not source.is_floating_point():
        raise LoRunError(f"values of {source.dtype} cannot be put in weights in eight bits: convert them to floats")
    numbers, scales = rounded(source.detach().cpu().expand(tensor.shape))
    tensor.numbers.copy_(numbers, non_blocking)
    tensor.scales.copy_(scales, non_blocking)
    return tensor


KEEP: Mapping[Any, Callable[..., EightBits]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.copy_.default: _copy_to,
}


def in_eight_bits(converted: Converted) -> Converted:
    """Return a network whose stages hold their matrices and kernels in eight bits; all other tensors are shared.

    A tensor stays as it is if it would not become smaller: those with one dimension, and small ones. What was measured
    of the sets is dropped.

    Raises:
        LoRunError: a tensor has NaN or Inf.
    """
    base, stage_map = converted.base, converted.stage_map
    kept = {id(tensor) for tensor in outside_parameters(base, stage_map).values()}
    buffers = buffer_names(base)
    held = base_tensors(base, stage_map).items()
    tensors = [(name, tensor) for name, tensor in held if name not in buffers and id(tensor) not in kept]
    return dataclasses.replace(
        converted,
        base=copy_network(base, share_tensors=True, replaced=_replacements(tensors)),
        sets={
            name: dataclasses.replace(
                held, adapters=_adapters_in_eight_bits(held), info=dataclasses.replace(held.info, quality=())
            )
            for name, held in converted.sets.items()
        },
    )


def copied_in_floats(held: AdapterSet) -> AdapterSet:
    """Return a copy of a set without weights in eight bits, which can be trained."""
    adapters = [adapter for groups in held.adapters.values() for adapter in groups.values()]
    return deep_copy(held, _floats(named for adapter in adapters for named in adapter.named_parameters()))


def in_floats(network: nn.Module) -> nn.Module:
    """Return a copy of a network without weights in eight bits."""
    return copy_network(network, replaced=_floats(network.named_parameters()))


def _floats(named: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
    """Ordinary parameters, by the ids of those in eight bits whose place they take."""
    packed = [tensor for _, tensor in named if isinstance(tensor, EightBits)]
    return {id(tensor): nn.Parameter(as_floats(tensor), requires_grad=False) for tensor in packed}


def _adapters_in_eight_bits(held: AdapterSet) -> dict[int, dict[str, StageAdapter]]:
    def packed(adapter: StageAdapter) -> StageAdapter:
        copied = copy_network(adapter, share_tensors=True, replaced=_replacements(adapter.named_parameters()))
        assert isinstance(copied, StageAdapter)
        return copied

    return {
        stage: {group: packed(adapter) for group, adapter in groups.items()} for stage, groups in held.adapters.items()
    }


def _replacements(named: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
    """The tensors in eight bits, by the ids of those whose place they take."""
    replaced: dict[int, Tensor] = {}
    for name, tensor in named:
        if isinstance(tensor, EightBits) or tensor.is_meta:
            continue
        packed = quantised(tensor.detach().cpu())
        if packed is not None:
            if not has_valid_values(tensor, buffer=False):
                raise LoRunError(f"{name!r} has NaN or Inf: go back to weights from before training diverged")
            numbers, scales = (part.to(tensor.device) for part in packed)
            replaced[id(tensor)] = nn.Parameter(EightBits(numbers, scales, tensor.dtype), requires_grad=False)
    return replaced


def as_floats(tensor: Tensor) -> Tensor:
    """Return a tensor in eight bits as an ordinary one, and any other as it is."""
    return tensor.float_values() if isinstance(tensor, EightBits) else tensor


def check_floats(network: nn.Module, done: str) -> None:
    """Check that no parameter is in eight bits.

    Args:
        network: the network.
        done: what cannot be done with one that is, as a participle.

    Raises:
        LoRunError: one is.
    """
    if any(isinstance(parameter, EightBits) for parameter in network.parameters()):
        raise LoRunError(f"weights in eight bits cannot be {done}: do that before int8(), or without it")
