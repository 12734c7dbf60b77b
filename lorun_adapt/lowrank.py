"""A stage's tensor as the shared base plus a low-rank term: W_k = W_0 + B_k A_k.

Any tensor is folded to a matrix first. The term is added where the tensor is read: the module stays
the same object, of a subclass on which the tensor is a property. That is what
``torch.nn.utils.parametrize`` does too; doing it here makes reading a tensor four times faster, and
lets networks that are put together alike have the same classes, so that ``torch.compile`` need not
compile anew for another set of adapters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

DEFAULT_RANK = 8
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)


def fold(shape: Sequence[int], owner: type[nn.Module] | None = None) -> tuple[int, int]:
    """The matrix (rows, columns) that a tensor of ``shape`` is folded to.

    Weights of linear and convolution layers fold as in PEFT: the first dimension against the
    rest. Other tensors fold where rows + columns, and so a low-rank pair, is smallest.
    """
    size = math.prod(shape)
    if len(shape) < 2 or size == 0:
        return size, 1
    if owner is not None and issubclass(owner, LAYERS):
        return shape[0], size // shape[0]
    rows = [math.prod(shape[:split]) for split in range(1, len(shape))]
    best = min(rows, key=lambda count: count + size // count)
    return best, size // best


def pair_size(matrix: tuple[int, int], rank: int) -> int:
    """Numbers in the factors of a (rows, columns) matrix at ``rank``."""
    return rank * sum(matrix)


class LowRank(nn.Module):
    """The low-rank term of one tensor of one stage.

    ``lora_A`` has shape (rank, columns) and ``lora_B`` (rows, rank), where (rows, columns) is
    what the tensor folds to. ``scaling`` is PEFT's; the forward reads it as a tensor, since
    ``torch.compile`` would compile anew for each value of a number.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_parameter("lora_A", nn.Parameter(lora_A.contiguous()))
        self.register_parameter("lora_B", nn.Parameter(lora_B.contiguous()))
        self.scaling = scaling
        factor = None if scaling == 1 else torch.tensor(scaling, dtype=lora_B.dtype, device=lora_B.device)
        self.register_buffer("factor", factor, persistent=False)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, base: Tensor) -> Tensor:
        return _sum(base, self.lora_A, self.lora_B, self.factor)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, matrix=({self.lora_B.shape[0]}, {self.lora_A.shape[1]}), scaling={self.scaling:g}"


def _sum(base: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        b = b * factor
    if torch.is_autocast_enabled(base.device.type) or not base.is_contiguous():
        # The product may have a low precision, or another order of dimensions: the sum is to be as the base is.
        return base + (b @ a).view_as(base)
    return torch.mm(b, a).view_as(base).add_(base)


def untrained(matrix: tuple[int, int], rank: int, scaling: float, like: Tensor, generator: torch.Generator) -> LowRank:
    """A term that is zero and can be trained: B is zero, A drawn as in PEFT (Kaiming uniform)."""
    rows, columns = matrix
    bound = 1 / math.sqrt(columns)
    a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return LowRank(a.to(like), torch.zeros(rows, rank, dtype=like.dtype, device=like.device), scaling)


def add_term(module: nn.Module, attribute: str, term: LowRank) -> None:
    """Make ``module.attribute`` read as the parameter that it is now plus the term."""
    base = module._parameters.pop(attribute)
    original, adapted = plain_class(module), getattr(type(module), "lorun_adapted", ())
    module.__class__ = _adapted_class(original, (*adapted, attribute))
    module.register_parameter(_BASE + attribute, base)
    module.add_module(_TERM + attribute, term)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the network's author gave ``module``."""
    return getattr(type(module), "lorun_plain_class", type(module))


def is_base(name: str) -> bool:
    """Whether a parameter of this name, in a network that runs, is the base to which terms are added."""
    return name.rpartition(".")[2].startswith(_BASE)


_BASE, _TERM = "lorun_base_", "lorun_term_"


@functools.cache
def _adapted_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, object] = {name: property(_reader(name)) for name in attributes}
    body |= {"__module__": original.__module__, "lorun_plain_class": original, "lorun_adapted": attributes}
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
