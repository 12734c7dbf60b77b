"""The kinds of term there are. To add one, write a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import LoRunError
from .lowrank import LowRank
from .term import Term

LORA = "LORA"

TERMS: dict[str, type[Term]] = {  # by the ``peft_type`` of the configs that ask for them
    LORA: LowRank,
}


def kind_of(peft_type: object) -> type[Term]:
    """The kind of term that a config of this ``peft_type`` asks for.

    Raises:
        LoRunError: no such kind.

    >>> from peft import LoraConfig
    >>> from lorun_adapt.terms.registry import kind_of
    >>> kind_of(LoraConfig().peft_type).__name__
    'LowRank'
    """
    name = getattr(peft_type, "value", peft_type)  # PEFT's own types are an enum of strings
    if name not in TERMS:
        raise LoRunError(f"no adapters of the type {name!r}: use a config of one of the types {sorted(TERMS)}")
    return TERMS[str(name)]


def other_kinds() -> Iterable[type[Term]]:
    """The kinds that PEFT's files have no form for."""
    return [kind for name, kind in TERMS.items() if name != LORA]
