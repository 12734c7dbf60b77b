"""A stage's tensor as the shared base plus a low-rank term: W_k = W_0 + B_k A_k.

Any tensor is folded to a matrix first. The term is added where the tensor is read: the module stays
the same object, of a subclass on which the tensor is a property. That is what
``torch.nn.utils.parametrize`` does too; doing it here makes reading a tensor four times faster, and
lets networks that are put together alike have the same classes, so that ``torch.compile`` need not
compile anew for another set of adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..terms.lowrank import LowRank, _sum


def add_term(module: nn.Module, attribute: str, term: LowRank) -> None:
    """Make ``module.attribute`` read as the parameter that it is now plus the term."""
    base = module._parameters.pop(attribute)
    original, adapted = original_class(module), getattr(type(module), "lorun_adapted", ())
    module.__class__ = _adapted_class(original, (*adapted, attribute))
    module.register_parameter(_BASE + attribute, base)
    module.add_module(_TERM + attribute, term)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the network's author gave ``module``."""
    return getattr(type(module), "lorun_original_class", type(module))


def is_base(name: str) -> bool:
    """Whether a parameter of this name, in a network that runs, is the base to which terms are added."""
    return name.rpartition(".")[2].startswith(_BASE)


_BASE, _TERM = "lorun_base_", "lorun_term_"


@functools.cache
def _adapted_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, object] = {name: property(_reader(name)) for name in attributes}
    body |= {"__module__": original.__module__, "lorun_original_class": original, "lorun_adapted": attributes}
    return type(f"Adapted{original.__name__}", (original,), body)


def _reader(attribute: str) -> Callable[[nn.Module], Tensor]:
    base, term = _BASE + attribute, _TERM + attribute

    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            try:  # past nn.Module.__getattr__: this runs for every tensor of every stage
                held = module._modules[term]
                factors = held._parameters
                return _sum(module._parameters[base], factors["lora_A"], factors["lora_B"], held._buffers["factor"])
            except KeyError:  # a replica of nn.DataParallel holds its tensors as plain attributes
                pass
        return getattr(module, term)(getattr(module, base))

    return read
