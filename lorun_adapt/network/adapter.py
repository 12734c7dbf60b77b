"""The adapter of one stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import Tensor, nn

from ..stages.stage_map import Group
from ..terms.term import Term
from ..util.numbers import is_numeric


class StageAdapter(nn.Module):
    """What one stage adds to the base: a term for each adapted tensor, and the stage's private tensors.

    Its modules and tensors have the names of the tensors in the denoiser, with ``/`` for the dots.

    Args:
        terms: the adapted tensors' terms, by name.
        private: the stage's own tensors, by name: parameters, or buffers.
        frozen: names of those that the network's authors don't train.
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
        """Make the tensors that the network's authors train trainable, or freeze all."""
        # Past nn.Module.named_parameters, and in as few steps as can be: this runs for every stage at each swap.
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
    """The adapter of a stage of ``group``; ``private``: the values of the tensors without a term."""
    held = {}
    for spec in group.tensors:
        if spec.name in private:
            value = private[spec.name]
            held[spec.name] = value if spec.buffer else nn.Parameter(value, requires_grad=is_numeric(value))
    return StageAdapter(terms, held, [spec.name for spec in group.tensors if spec.frozen])


def terms_of(adapter: StageAdapter) -> dict[str, Term]:
    """The adapter's terms, by the names of the tensors in the denoiser."""
    return {name.replace("/", "."): cast(Term, term) for name, term in adapter._modules.items()}


def private_tensors(adapter: StageAdapter) -> dict[str, Tensor]:
    """The stage's own tensors, by their names in the denoiser."""
    tensors = {**adapter._parameters, **adapter._buffers}
    return {name.replace("/", "."): tensor for name, tensor in tensors.items() if tensor is not None}
