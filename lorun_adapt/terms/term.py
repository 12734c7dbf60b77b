"""What a stage adds to the shared base for one tensor: the interface of all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..disk.reading import Slot
from ..stages.stage_map import TensorSpec

AnyTerm = TypeVar("AnyTerm", bound="Term")


class Setting(NamedTuple):
    """What a config asks of one tensor's term: PEFT's rank and scaling (alpha / r, or alpha / sqrt(r))."""

    rank: int
    scaling: float = 1.0


class Weighting(NamedTuple):
    """How much each direction of a tensor's N matrices (N, m, n) matters to the network's output.

    Attributes:
        rows: (N, m, m), or (N, 1, 1) where all rows count alike.
        columns: (N, n, n), or (N, 1, 1).
        damping: this part of the mean weight is added to every direction.
    """

    rows: Tensor
    columns: Tensor
    damping: float


class LoraFactors(NamedTuple):
    """A term as PEFT has it: the tensor, folded to (m, n), is the base plus ``scaling * b @ a``.

    Attributes:
        a: (r, n).
        b: (m, r).
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


class Fitted(NamedTuple):
    """N stages' tensors as one base and a term each.

    Attributes:
        base: the shape of one stage's tensor.
        terms: one for each stage.
        lost: (N,) the squared norm of what each stage loses.
    """

    base: Tensor
    terms: Sequence[Term]
    lost: Tensor


class Term(nn.Module):
    """What one stage adds to the base for one tensor: ``term(base)`` is the stage's tensor.

    Every kind of adapter is a subclass, in a file of this folder, and a line in ``registry.py``. A kind must define
    :meth:`forward`, :meth:`fit`, :meth:`untrained`, :meth:`weighted_sum`, :meth:`size` and :meth:`file_slots`; the
    other methods have defaults that hold for a term whose parameters are the arguments of its constructor.

    Its parameters are what trains. They are ``nn.Parameter`` and registered directly on the term.
    """

    scaling: float = 1.0
    rank: int = 0  # shown in tables; 0 for kinds without a rank

    def forward(self, base: Tensor) -> Tensor:
        """The stage's tensor, in the shape and dtype of ``base``."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of these in memory."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    # --- making terms ----------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        stages: Tensor,
        spec: TensorSpec,
        setting: Setting,
        *,
        weighting: Weighting | None = None,
        generator: torch.Generator | None = None,
    ) -> Fitted:
        """Split the tensors of N stages into a base and a term each, losing as little as possible.

        Args:
            stages: (N, *spec.shape), on the CPU.
            spec: the tensor. Where ``spec.without_base``, the base must be zero.
            setting: what the config asks for.
            weighting: which directions matter. A kind may ignore it.
            generator: for terms that start at zero. Without it, terms are exactly what the fit gives.
        """
        raise NotImplementedError

    @classmethod
    def untrained(
        cls: type[AnyTerm], spec: TensorSpec, setting: Setting, like: Tensor, generator: torch.Generator
    ) -> AnyTerm:
        """A term that changes nothing yet and can be trained, with the dtype and device of ``like``."""
        raise NotImplementedError

    @classmethod
    def weighted_sum(cls: type[AnyTerm], terms: Sequence[AnyTerm], weights: Sequence[float]) -> AnyTerm:
        """The term that adds the weighted sum of what ``terms`` add."""
        raise NotImplementedError

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        """How many parameters a term of this tensor has."""
        raise NotImplementedError

    @classmethod
    def highest_rank(cls, spec: TensorSpec) -> int | None:
        """The rank above which a higher one changes nothing; None if there is no such limit."""
        return None

    # --- files -----------------------------------------------------------------------------------

    @classmethod
    def file_slots(cls, spec: TensorSpec) -> dict[str, Slot]:
        """The tensors that a file holds of a term, by a short name: their shapes (None: the rank) and dtypes."""
        raise NotImplementedError

    def file_tensors(self) -> dict[str, Tensor]:
        """The term's tensors by the names in :meth:`file_slots`."""
        return dict(self.named_parameters())

    @classmethod
    def from_file(cls: type[AnyTerm], tensors: Mapping[str, Tensor]) -> AnyTerm:
        """The term with these tensors, which fit :meth:`file_slots` and are all there."""
        return cls(**tensors)

    # --- PEFT ------------------------------------------------------------------------------------

    def as_lora(self) -> LoraFactors | None:
        """The term as PEFT's LoRA has it; None where PEFT can't represent it."""
        return None

    @classmethod
    def from_lora(cls: type[AnyTerm], factors: LoraFactors) -> AnyTerm:
        """The term with these factors; only for kinds with :meth:`as_lora`."""
        raise NotImplementedError
