"""Modules that read some of their parameters through a term.

The module object stays the same, but its class becomes a subclass with a property in place of the tensor. This is what
``torch.nn.utils.parametrize`` does, with two differences: reading a tensor is four times faster, and networks of the
same structure have the same classes, so that ``torch.compile`` does not recompile for another adapter set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..terms.term import Term
from ..util.modules import subclass_of
from .composed import keeps, kept, mark
from .factored import factored, is_faster

_BASE, _TERM, _MERGED = "lorun_base_", "lorun_term_", "lorun_merged_"
_Reader = Callable[[str], Callable[[nn.Module], Tensor]]


def add_term(
    module: nn.Module, attribute: str, term: Term, *, without_base: bool = False, stage: int | None = None
) -> None:
    """Make ``module.attribute`` return ``term(parameter)`` instead of the parameter.

    Args:
        module: a module of a denoiser; its class changes.
        attribute: the name of one of its parameters.
        term: the term.
        without_base: the parameter is zero. This saves the sum, and may save the product: see ``factored.py``.
        stage: the stage that the module belongs to.

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
    mark(module, stage)


def merge_terms(network: nn.Module) -> None:
    """Compute the tensors of all stages once and for all; those that are faster as factors stay as they are.

    The tensors hold what the terms amount to at this moment, and do not follow them.
    """
    for module in network.modules():
        adapted: tuple[tuple[str, _Reader], ...] = getattr(type(module), "lorun_adapted", ())
        for attribute, reader in adapted:
            if reader is not _read_factors:
                with torch.no_grad():
                    vars(module)[_MERGED + attribute] = getattr(module, attribute)
        if adapted:
            readers = tuple((name, reader if reader is _read_factors else _read_merged) for name, reader in adapted)
            module.__class__ = _adapted_class(cast(Hashable, original_class(module)), readers)


def adapted_parameters(network: nn.Module) -> Iterator[tuple[nn.Parameter, Term]]:
    """Yield the parameters of an assembled network that are read through a term, each with the term."""
    for module in network.modules():
        for attribute, _ in getattr(type(module), "lorun_adapted", ()):
            yield module.get_parameter(_BASE + attribute), cast(Term, module.get_submodule(_TERM + attribute))


def merged_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`merge_terms` computed, with names."""
    for path, module in network.named_modules():
        for key, value in vars(module).items():
            if key.startswith(_MERGED):
                yield f"{path}.{key.removeprefix(_MERGED)}".lstrip("."), value


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

    def compose(module: nn.Module) -> Tensor:
        return getattr(module, term)(getattr(module, base))

    def read(module: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():
            return compose(module)
        if not keeps(module, attribute):
            try:  # bypass nn.Module.__getattr__ and __call__, since this runs for every tensor of every stage
                return module._modules[term].forward(module._parameters[base])  # type: ignore[union-attr]
            except KeyError:  # replicas of nn.DataParallel hold their tensors as plain attributes
                return compose(module)
        return kept(module, attribute, compose)

    return read


def _read_product(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def compose(module: nn.Module) -> Tensor:
        b, a = getattr(module, term).product()
        return torch.mm(b, a).view(getattr(module, base).shape)

    def read(module: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or not keeps(module, attribute):
            return compose(module)
        return kept(module, attribute, compose)

    return read


def _read_factors(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def read(module: nn.Module) -> Tensor:
        b, a = getattr(module, term).product()
        return factored(b, a, getattr(module, base).shape)

    return read


def _read_merged(attribute: str) -> Callable[[nn.Module], Tensor]:
    merged = _MERGED + attribute
    return lambda module: module.__dict__[merged]
