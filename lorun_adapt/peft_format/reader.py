"""Read one denoiser's adapter from the tensors and the ``LoraConfig`` in a folder, whoever wrote them."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..disk.reading import Slot, file_limit, parse_json, parse_tensors
from ..errors import LoRunError
from ..network.adapter import StageAdapter, make_adapter
from ..stages.stage_map import Group, Site, StageMap, TensorSpec
from ..terms.registry import LORA, TERMS, other_kinds
from ..terms.term import LoraFactors, Term
from ..util.modules import has_valid_values
from .limits import layer_problem
from .lora import PREFIX, Names, bias_name, bias_of, factor_name
from .options import REFUSED, config_from_json
from .template import Place, Template, template_of

USUAL_RANKS = 256  # up to here a file's rank may be above all sides of the network's matrices
MOST_CONFIGS = 16  # kept: the stages of a set have one, mostly


def readers_of(base: nn.Module, stage_map: StageMap) -> dict[tuple[str, str], Reader]:
    """What reads the files of each denoiser, by its group's name and its module: one for all that are alike."""
    found: dict[tuple[str, str], Reader] = {}
    for group in stage_map.groups:
        different: list[Reader] = []
        for site in group.sites:
            reader = Reader(base, group, site)
            alike = next((other for other in different if other.slots == reader.slots), None)
            if alike is None:
                different.append(reader)
            found[group.name, site.module] = alike or reader
    return found


class Reader:
    """Reads the files of a group's denoisers; what they have in common is worked out once.

    Attributes:
        slots: what a file may hold: by name, the shape and dtype.
        highest: the highest rank that a file may have: above a tensor's limit, as PEFT allows it, but within reason.
        num_bytes: the most bytes that a file may have.
    """

    def __init__(self, base: nn.Module, group: Group, site: Site) -> None:
        self.base, self.group = base, group
        denoiser = base.get_submodule(site.module)  # its tensors are those of all
        self._names = [(spec, Names(denoiser, spec)) for spec in group.tensors if not spec.common]
        self._adaptable = {spec.name for spec, _ in self._names if spec.adaptable}
        self._own = {spec.name for spec, _ in self._names}
        self._templates: dict[tuple[bytes, bytes, int], tuple[Template, dict[str, str]]] = {}
        self._configs: dict[bytes, Wanted] = {}
        self._problems: dict[tuple[str, frozenset[str]], str | None] = {}
        self.slots: dict[str, Slot] = {}
        for spec, names in self._names:
            self.slots[PREFIX + spec.name] = Slot(spec.shape, spec.dtype)
            if spec.name in self._adaptable:
                self.slots |= {names.a: Slot(names.a_shape, spec.dtype), names.b: Slot(names.b_shape, spec.dtype)}
                if names.layer is not None:
                    self.slots[names.bias] = Slot((spec.shape[0],), spec.dtype)
                for kind in other_kinds():
                    self.slots |= {f"{PREFIX}{spec.name}.{part}": slot for part, slot in kind.file_slots(spec).items()}
        self.highest = max([USUAL_RANKS, *(max(spec.matrix) for spec in group.tensors if spec.adaptable)])
        self.num_bytes = file_limit(self.slots, self.highest)

    def read(
        self, config: bytes, content: bytes, site: Site, where: Sequence[str]
    ) -> tuple[StageAdapter, LoraConfig, dict[str, str]]:
        """The adapter for the denoiser at ``site``, its config, and the metadata of its tensors.

        Args:
            config, content: the bytes of the two files.
            where: what these are called.

        Raises:
            LoRunError: damage, or what is not for this denoiser; see :meth:`adapter`.
        """
        wanted = self._wanted(config, where[0])
        length = int.from_bytes(content[:8], "little")
        key = config, content[: 8 + length], len(content)
        if (known := self._templates.get(key)) is not None:
            template, metadata = known
            filled = template.filled(content)
            if (
                filled is not None
                and self._problem([n.replace("/", ".") for n in filled._modules], wanted, site) is None
            ):
                return filled, wanted.lora_config, metadata
        tensors, metadata = parse_tensors(content, self.slots, where[1], self.highest)
        adapter = self.adapter(tensors, wanted, site, where[1])
        template = template_of(content, tensors, self._places(), adapter)
        if template is not None and len(self._templates) < MOST_CONFIGS:
            self._templates[key] = template, metadata
        return adapter, wanted.lora_config, metadata

    def _places(self) -> dict[str, Place]:
        """Where the tensors of a file go that need nothing done to them."""
        found: dict[str, Place] = {}
        for spec, names in self._names:
            factors = list(TERMS[LORA].file_slots(spec))  # the names of A and B in a term
            key = spec.name.replace(".", "/")
            found |= {PREFIX + spec.name: ("", key), names.a: (key, factors[0]), names.b: (key, factors[1])}
        return found

    def _wanted(self, content: bytes, where: str) -> Wanted:
        """What the bytes of a config say.

        Raises:
            LoRunError: as :func:`config_from_json`.
        """
        if (known := self._configs.get(content)) is not None:  # other threads may load too
            return known
        options = parse_json(content, where)
        found = Wanted(config_from_json(options, where, len(self.group.tensors)))
        if not options.get("lora_dropout"):  # which is warned of each time
            if len(self._configs) >= MOST_CONFIGS:
                self._configs.clear()
            self._configs[content] = found
        return found

    def adapter(self, tensors: Mapping[str, Tensor], wanted: Wanted, site: Site, where: str) -> StageAdapter:
        """The adapter that ``tensors``, which fit ``slots``, hold for the denoiser at ``site``.

        What an adapter of PEFT's own neither targets nor saves stays as in the base. A rank above a tensor's
        limit is brought down to it, with a warning; the product stays the same.

        Raises:
            LoRunError: a missing or an extra tensor, a rank that the config doesn't say, NaN or Inf; a
                denoiser to which PEFT's layers do something else than their factors to its weights.
        """
        left = dict(tensors)
        terms: dict[str, Term] = {}
        private: dict[str, Tensor] = {}

        def fail(expected: str, found: str) -> LoRunError:
            return LoRunError(
                f"expected {expected}, found {found} in {where}: load it into the network it was made for, or download "
                "it again"
            )

        for spec, names in self._names:
            base = names.owner._buffers[names.attribute] if spec.buffer else names.owner._parameters[names.attribute]
            assert base is not None
            pair = []
            if spec.name in self._adaptable:
                pair = [left.pop(name) for name in (names.a, names.b) if name in left]
            if len(pair) == 1:
                raise fail(f"both factors of {spec.name!r}", "one")
            if (other := self._other_term(spec, left)) is not None:
                terms[spec.name] = other
                continue
            # Where a file has factors and the whole tensor, one is PEFT's way of seeing the other.
            if pair and (wanted.saved(spec) or PREFIX + spec.name not in left):
                left.pop(PREFIX + spec.name, None)
                rank = wanted.rank(names.key)
                found = [factor.shape[side.index(None)] for factor, side in zip(pair, (names.a_shape, names.b_shape))]
                if found != [rank, rank]:
                    raise fail(f"factors of rank {rank} for {spec.name!r}, as its config says", f"ranks {found}")
                terms[spec.name] = _term(spec, pair, wanted.scaling(names.key, rank), base, where)
                lacking = names.bias if names.layer is not None and f"{names.key}.bias" not in self._own else None
                if lacking in left and bool(left.pop(lacking).any()):
                    raise fail(f"no bias for {names.key!r}, which has none of its own", "one")
                continue
            if names.layer is not None and not pair and wanted.targets(names.key) and not wanted.saved(spec):
                raise fail(f"the factors of {spec.name!r}, which the config targets", "none")
            value = left.pop(PREFIX + spec.name, None)
            layer = spec.name.removesuffix(".bias")
            if layer != spec.name and factor_name(layer) in tensors:
                difference = left.pop(bias_name(layer), None)
                if value is None and difference is not None:
                    value = bias_of(base.detach(), difference, wanted.scaling(layer, wanted.rank(layer)))
                if value is None and wanted.lora_bias:
                    raise fail(f"the bias of {layer!r}, since the config says lora_bias", "none")
            if value is None and (wanted.everything or wanted.saved(spec)):
                raise fail(f"the tensor {spec.name!r}", "none")
            private[spec.name] = base.detach().clone() if value is None else value.to(base)
        if left:
            raise fail(f"the tensors that the config says of {self.group.name!r}", f"{sorted(left)[0]!r} beside them")
        problem = self._problem(terms, wanted, site)
        if problem is not None:
            raise fail(f"a denoiser to which PEFT's layers do what is done here ({problem})", "an adapter of PEFT's")
        if (name := _invalid(terms, private, {spec.name for spec, _ in self._names if spec.buffer})) is not None:
            raise LoRunError(
                f"{name!r} holds NaN or Inf, or its scaling does, in {where}: download it again, or save it with "
                "weights from before training diverged"
            )
        return make_adapter(self.group, terms, private)

    def _other_term(self, spec: TensorSpec, left: dict[str, Tensor]) -> Term | None:
        """The term of another kind than LoRA's that a file has for a tensor; its tensors are removed from ``left``."""
        for kind in other_kinds() if spec.adaptable else ():
            names = {part: f"{PREFIX}{spec.name}.{part}" for part in kind.file_slots(spec)}
            if all(name in left for name in names.values()):
                return kind.from_file({part: left.pop(name) for part, name in names.items()})
        return None

    def _problem(self, terms: Iterable[str], wanted: Wanted, site: Site) -> str | None:
        """Why PEFT's layers would do something else than is done here, where the file is PEFT's as well."""
        if wanted.everything:
            return None
        key = site.module, frozenset(terms)
        if key not in self._problems:
            layers = {name.rpartition(".")[0] for name in terms}
            denoisers = [self.base.get_submodule(s.module) for s in (site, self.group.sites[0])]
            self._problems[key] = layer_problem(*denoisers, layers)
        for spec, _ in self._names:
            if len(spec.aliases) > 1 and (spec.name in terms or wanted.saved(spec)):
                return f"{spec.name!r} is tied"
        return self._problems[key]


def _invalid(terms: Mapping[str, Term], private: Mapping[str, Tensor], buffers: Collection[str]) -> str | None:
    """The first tensor with values that a trained network can't have."""
    tensors = [(name, t, False) for name, term in terms.items() for t in (*term.parameters(), *term.buffers())]
    tensors += [(name, tensor, name in buffers) for name, tensor in private.items()]
    # All at once first, since one by one takes longer than reading the file: of NaN, Inf, and huge numbers, the sum is
    # not finite.
    floats = [tensor.detach().flatten() for _, tensor, _ in tensors if tensor.is_floating_point()]
    if len(floats) == len(tensors) > 0 and math.isfinite(torch.cat(floats).sum().item()):
        return None
    return next((name for name, tensor, buffer in tensors if not has_valid_values(tensor, buffer)), None)


def _term(spec: TensorSpec, pair: Sequence[Tensor], scaling: float, base: Tensor, where: str) -> Term:
    """The term of a file's factors A and B, at the tensor's highest rank at most."""
    rows, columns = spec.matrix
    a, b = pair[0].reshape(-1, columns), pair[1].reshape(rows, -1)
    limit = min(rows, columns)
    if len(a) > limit:
        warnings.warn(
            f"rank {len(a)} is above the limit of {spec.name!r} in {where}: {limit} is used, for the same product",
            stacklevel=2,
        )
        exact = torch.complex128 if base.is_complex() else torch.float64
        product = b.to(exact) @ a.to(exact)
        a, b = (product, torch.eye(rows)) if rows <= columns else (torch.eye(columns), product)
    return TERMS[LORA].from_lora(LoraFactors(a.to(base), b.to(base), scaling))


class Wanted:
    """What a file must hold, by its config, and the numbers that the config has for each tensor."""

    def __init__(self, config: LoraConfig) -> None:
        self.everything = config.rank_pattern.get(REFUSED) == 0  # ours, and not for PEFT
        self.lora_config = config
        self.config = copy.copy(config)
        self.config.rank_pattern = {key: r for key, r in config.rank_pattern.items() if (key, r) != (REFUSED, 0)}
        self.lora_bias = config.lora_bias
        # Asked anew for each stage, and slow, as they match patterns.
        self.rank, self.scaling = functools.cache(self._rank), functools.cache(self._scaling)
        self.targets, self.saved = functools.cache(self._targets), functools.cache(self._saved)

    def _rank(self, key: str) -> int:
        pattern = self.config.rank_pattern
        return pattern.get(get_pattern_key(pattern.keys(), key), self.config.r)

    def _scaling(self, key: str, rank: int) -> float:
        pattern = self.config.alpha_pattern
        alpha = pattern.get(get_pattern_key(pattern.keys(), key), self.config.lora_alpha)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def _targets(self, module: str) -> bool:
        return self.config.target_modules is not None and bool(check_target_module_exists(self.config, module))

    def _saved(self, spec: TensorSpec) -> bool:
        """Whether modules_to_save names a module with the tensor, by PEFT's rule: its name ends so."""
        for alias in spec.aliases:
            parts = alias.split(".")[:-1]
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if any(name.endswith(saved) for saved in self.config.modules_to_save or ()):
                    return True
        return False
