"""Modules that read some of their parameters through a term.

The module object stays the same, but its class becomes a subclass with a property in place of the tensor. This is what
``torch.nn.utils.parametrize`` does, with two differences: reading a tensor is four times faster, and networks of the
same structure have the same classes, so that ``torch.compile`` does not recompile for another adapter set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import cast

import torch
from torch import Tensor, nn

from ..terms.term import Term
from ..util.modules import subclass_of
from .factored import factored, is_faster

_BASE, _TERM = "lorun_base_", "lorun_term_"
_Reader = Callable[[str], Callable[[nn.Module], Tensor]]


def add_term(module: nn.Module, attribute: str, term: Term, without_base: bool = False) -> None:
    """Make ``module.attribute`` return ``term(parameter)`` instead of the parameter.

    If the parameter is zero, ``without_base`` saves the sum, and may save the product: see ``factored.py``.

    >>> from lorun_adapt.terms.registry import TERMS
    >>> from lorun_adapt.terms.term import LoraFactors
    >>> layer = nn.Linear(3, 2)
    >>> before = layer.weight.detach().clone()
    >>> add_term(layer, "weight", TERMS["LORA"].from_lora(LoraFactors(torch.ones(1, 3), torch.ones(2, 1))))
    >>> torch.equal(layer.weight, before + 1)
    True
    """
    product = term.product() if without_base else None
    reader = _read_sum
    if product is not None:
        b, a = product
        reader = _read_factors if is_faster((len(b), a.shape[1]), len(a)) else _read_product
    base = module._parameters.pop(attribute)
    original, adapted = original_class(module), getattr(type(module), "lorun_adapted", ())
    module.__class__ = _adapted_class(cast(Hashable, original), (*adapted, (attribute, reader)))
    module.register_parameter(_BASE + attribute, base)
    module.add_module(_TERM + attribute, term)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module`` before terms were added."""
    return getattr(type(module), "lorun_original_class", type(module))


def is_base(name: str) -> bool:
    """Whether a parameter of this name, in an assembled network, is read through a term."""
    return name.rpartition(".")[2].startswith(_BASE)


@functools.cache
def _adapted_class(original: type[nn.Module], attributes: tuple[tuple[str, _Reader], ...]) -> type[nn.Module]:
    body: dict[str, object] = {name: property(reader(name)) for name, reader in attributes}
    body |= {"__module__": original.__module__, "lorun_original_class": original, "lorun_adapted": attributes}
    return subclass_of(original, "Adapted", body)


def _read_sum(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            try:  # bypass nn.Module.__getattr__ and __call__, since this runs for every tensor of every stage
                return module._modules[term].forward(module._parameters[base])  # type: ignore[union-attr]
            except KeyError:  # replicas of nn.DataParallel hold their tensors as plain attributes
                pass
        return getattr(module, term)(getattr(module, base))

    return read


def _read_product(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def read(module: nn.Module) -> Tensor:
        b, a = getattr(module, term).product()
        return torch.mm(b, a).view(getattr(module, base).shape)

    return read


def _read_factors(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def read(module: nn.Module) -> Tensor:
        b, a = getattr(module, term).product()
        return factored(b, a, getattr(module, base).shape)

    return read
