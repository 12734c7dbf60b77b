"""The registry of term kinds. To add a kind, write a file in this folder and add a line here."""

from __future__ import annotations

from ..errors import LoRunError
from .lowrank import LowRank
from .sparse import LowRankAndSparse, Sparse
from .term import Term

LORA = "LORA"

TERMS: dict[str, type[Term]] = {  # by the ``peft_type`` of a config
    LORA: LowRank,
    "SPARSE": Sparse,
    "LORA_AND_SPARSE": LowRankAndSparse,
}


def kind_of(peft_type: object) -> type[Term]:
    """Return the kind of term for the ``peft_type`` of a config.

    Raises:
        LoRunError: an unknown kind.

    >>> from peft import LoraConfig
    >>> from lorun_adapt.terms.registry import kind_of
    >>> kind_of(LoraConfig().peft_type).__name__
    'LowRank'
    """
    name = getattr(peft_type, "value", peft_type)  # PEFT's types are an enum of strings
    if name not in TERMS:
        raise LoRunError(f"adapters of type {name!r} are not supported: use a config of a type in {sorted(TERMS)}")
    return TERMS[str(name)]


def other_kinds() -> list[type[Term]]:
    """Return the kinds that PEFT's file format cannot represent."""
    return [kind for name, kind in TERMS.items() if name != LORA]
