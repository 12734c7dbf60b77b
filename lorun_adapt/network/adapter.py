"""The adapter of one stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import Tensor, nn

from ..stages.stage_map import Group
from ..terms.term import Term
from ..util.numbers import is_numeric


class StageAdapter(nn.Module):
    """The adapter of one stage: a term for each adapted tensor, and the stage's private tensors.

    Modules and tensors are registered under the names of the tensors in the denoiser, with ``/`` instead of dots.

    Args:
        terms: the terms of the adapted tensors, by name.
        private: the tensors of this stage that have no term, by name: parameters or buffers.
        frozen: names of the tensors that the original network does not train.
    """

    def __init__(self, terms: Mapping[str, Term], private: Mapping[str, Tensor], frozen: Collection[str] = ()) -> None:
        super().__init__()
        self.lorun_frozen = frozenset(name.replace(".", "/") for name in frozen)
        for name, term in terms.items():
            self.add_module(name.replace(".", "/"), term)
        for name, tensor in private.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "/"), tensor)
            else:
                self.register_buffer(name.replace(".", "/"), tensor)

    def set_trainable(self, trainable: bool) -> None:
        """Freeze all tensors, or make those trainable that the original network trains."""
        # Bypass nn.Module.named_parameters, which is slow: this runs for every stage at each swap.
        for name, term in self._modules.items():
            wanted = trainable and name not in self.lorun_frozen
            for parameter in cast(Term, term)._parameters.values():
                if parameter is not None and parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                wanted = trainable and name not in self.lorun_frozen and is_numeric(parameter)
                if parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)


def make_adapter(group: Group, terms: Mapping[str, Term], private: Mapping[str, Tensor]) -> StageAdapter:
    """Return the adapter of a stage of ``group``; ``private`` has the values of the tensors without a term."""
    held = {}
    for spec in group.tensors:
        if spec.name in private:
            value = private[spec.name]
            held[spec.name] = value if spec.buffer else nn.Parameter(value, requires_grad=is_numeric(value))
    return StageAdapter(terms, held, [spec.name for spec in group.tensors if spec.frozen])


def terms_of(adapter: StageAdapter) -> dict[str, Term]:
    """Return the adapter's terms by the names of the tensors in the denoiser."""
    return {name.replace("/", "."): cast(Term, term) for name, term in adapter._modules.items()}


def private_tensors(adapter: StageAdapter) -> dict[str, Tensor]:
    """Return the stage's private tensors by their names in the denoiser."""
    tensors = {**adapter._parameters, **adapter._buffers}
    return {name.replace("/", "."): tensor for name, tensor in tensors.items() if tensor is not None}
