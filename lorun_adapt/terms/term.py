"""The interface of terms: what a stage adds to the shared base for one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..disk.reading import Slot
from ..stages.stage_map import TensorSpec

AnyTerm = TypeVar("AnyTerm", bound="Term")


class Setting(NamedTuple):
    """The rank and scaling of one tensor's term, as in PEFT: scaling is alpha / r, or alpha / sqrt(r) for rsLoRA."""

    rank: int
    scaling: float = 1.0


class Weighting(NamedTuple):
    """Weights of the directions of a tensor's N matrices (N, m, n) by their effect on the network's output.

    Attributes:
        rows: (N, m, m), or (N, 1, 1) for equal weights.
        columns: (N, n, n), or (N, 1, 1) for equal weights.
        damping: the fraction of the mean weight that is added to every direction.
    """

    rows: Tensor
    columns: Tensor
    damping: float


class LoraFactors(NamedTuple):
    """A term in PEFT's form: the tensor, folded to a matrix (m, n), is the base plus ``scaling * b @ a``.

    Attributes:
        a: (r, n).
        b: (m, r).
        scaling: PEFT's scaling.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


class Fitted(NamedTuple):
    """The tensors of N stages, factorised into a base and one term each.

    Attributes:
        base: the base, in the shape of one stage's tensor.
        terms: one for each stage.
        lost: (N,), the squared norm of each stage's residual.
    """

    base: Tensor
    terms: Sequence[Term]
    lost: Tensor


class Term(nn.Module):
    """What one stage adds to the base for one tensor: ``term(base)`` is the stage's tensor.

    Each kind of adapter is a subclass in a file of this folder, with a line in ``registry.py``. A kind must define
    :meth:`forward`, :meth:`fit`, :meth:`untrained`, :meth:`weighted_sum`, :meth:`size` and :meth:`file_slots`. The
    other methods have defaults that work if the parameters of the term are the arguments of its constructor.

    The parameters are trained. They must be ``nn.Parameter`` and registered directly on the term.
    """

    scaling: float = 1.0
    rank: int = 0  # shown in tables; 0 for kinds without a rank

    def sizes_of_zeros(self, base: Tensor) -> dict[str, float]:
        """Return, by name, how large parameters that are all zero would be in a trained term (root mean square).

        Their learning rates are relative to that. By default it is the same small number for all.
        """
        return {}

    def forward(self, base: Tensor) -> Tensor:
        """Return the stage's tensor, in the shape and dtype of ``base``."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the parameters in memory."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def product(self) -> tuple[Tensor, Tensor] | None:
        """Return what the term adds, folded to a matrix (m, n), as factors (m, r) and (r, n); None if it has none.

        A tensor without a base is used in this form where that is faster.
        """
        return None

    def pruned(self: AnyTerm, rank: int, start: AnyTerm) -> AnyTerm | None:
        """Return a term of a lower rank, with the largest entries of this one, and the values that ``start`` has there.

        None for kinds without entries that could be dropped.
        """
        return None

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
        """Factorise the tensors of N stages into a base and one term each, with the smallest residuals.

        Args:
            stages: (N, *spec.shape), on the CPU.
            spec: the tensor. If ``spec.without_base``, the base must be zero.
            setting: the rank and scaling from the config.
            weighting: weights of the directions; a kind may ignore it.
            generator: initialises terms that would be zero, so that they can be trained. Without it, the fitted terms
                are returned as they are.
        """
        raise NotImplementedError

    @classmethod
    def lost(cls, stages: Tensor, spec: TensorSpec, setting: Setting) -> Tensor:
        """Return what :meth:`fit` would lose, (N,) squared norms; a kind may compute it without making terms."""
        return cls.fit(stages, spec, setting).lost

    @classmethod
    def untrained(
        cls: type[AnyTerm], spec: TensorSpec, setting: Setting, like: Tensor, generator: torch.Generator
    ) -> AnyTerm:
        """Return a trainable term that does not change the base, with the dtype and device of ``like``."""
        raise NotImplementedError

    @classmethod
    def weighted_sum(cls: type[AnyTerm], terms: Sequence[AnyTerm], weights: Sequence[float]) -> AnyTerm:
        """Return a term that adds the weighted sum of what ``terms`` add."""
        raise NotImplementedError

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        """Return how many numbers a term of this rank stores; 32 further bits count as one number."""
        raise NotImplementedError

    @classmethod
    def highest_rank(cls, spec: TensorSpec) -> int | None:
        """Return the highest useful rank; None if there is no limit."""
        return None

    # --- files -----------------------------------------------------------------------------------

    @classmethod
    def file_slots(cls, spec: TensorSpec) -> dict[str, Slot]:
        """Return the shapes and dtypes of the tensors that a file stores for a term, by short names.

        None in a shape stands for the rank.
        """
        raise NotImplementedError

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by the names in :meth:`file_slots`."""
        return dict(self.named_parameters())

    @classmethod
    def from_file(cls: type[AnyTerm], tensors: Mapping[str, Tensor]) -> AnyTerm:
        """Return the term with stored tensors, which have been checked to match :meth:`file_slots`."""
        return cls(**tensors)

    # --- PEFT ------------------------------------------------------------------------------------

    def as_lora(self) -> LoraFactors | None:
        """Return the term in the form of PEFT's LoRA; None if PEFT cannot represent it."""
        return None

    @classmethod
    def from_lora(cls: type[AnyTerm], factors: LoraFactors) -> AnyTerm:
        """Return the term with these factors; only for kinds that define :meth:`as_lora`."""
        raise NotImplementedError
