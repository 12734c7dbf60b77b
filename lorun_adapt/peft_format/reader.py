"""Read the adapter of one denoiser from the tensors and the ``LoraConfig`` in a folder, from this package or PEFT."""

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
from ..stages.tensors import base_denoiser
from ..terms.registry import LORA, TERMS, other_kinds
from ..terms.term import LoraFactors, Term
from ..util.modules import has_valid_values
from ..util.numbers import double_of
from .limits import layer_problem
from .lora import PREFIX, FactorNames, bias_name, bias_of, factor_name
from .options import REFUSED, config_from_json
from .template import Difference, Place, Template, template_of

ALWAYS_ALLOWED_RANK = 256  # a file may have a rank up to this, even if the network's matrices are smaller
MAX_CONFIGS = 16  # in the cache; the stages of a set mostly have the same config


def readers_of(base: nn.Module, stage_map: StageMap) -> dict[tuple[str, str], Reader]:
    """Return the reader of each denoiser's files, by (group, module); identical denoisers with one base share one."""
    found: dict[tuple[str, str], Reader] = {}
    for group in stage_map.groups:
        distinct: list[Reader] = []
        for site in group.sites:
            reader = Reader(base, stage_map, group, site)
            others = distinct if stage_map.shared else []
            alike = next((other for other in others if other.slots == reader.slots), None)
            if alike is None:
                distinct.append(reader)
            found[group.name, site.module] = alike or reader
    return found


class Reader:
    """Reads the files of a group's denoisers, and caches what they have in common.

    Attributes:
        slots: the shape and dtype of each tensor that a file may hold, by name.
        highest: the highest rank that a file may have. PEFT allows ranks above the size of a matrix.
        num_bytes: the maximum size of a file.
    """

    def __init__(self, base: nn.Module, stage_map: StageMap, group: Group, site: Site) -> None:
        self.base, self.stage_map, self.group = base, stage_map, group
        self._denoiser = denoiser = base.get_submodule(site.module)
        self._names = [(spec, FactorNames(denoiser, spec)) for spec in group.tensors if not spec.common]
        self._adaptable = {spec.name for spec, _ in self._names if spec.adaptable}
        self._own = {spec.name for spec, _ in self._names}
        self._templates: dict[tuple[bytes, bytes, int], tuple[Template, dict[str, str]]] = {}
        self._configs: dict[bytes, FileConfig] = {}
        self._problems: dict[tuple[str, frozenset[str]], str | None] = {}
        self._other_kinds = other_kinds()
        self.slots: dict[str, Slot] = {}
        for spec, names in self._names:
            self.slots[PREFIX + spec.name] = Slot(spec.shape, spec.dtype)
            if spec.name in self._adaptable:
                self.slots |= {names.a: Slot(names.a_shape, spec.dtype), names.b: Slot(names.b_shape, spec.dtype)}
                if names.layer is not None:
                    self.slots[names.bias] = Slot((spec.shape[0],), spec.dtype)
                for kind in self._other_kinds:
                    self.slots |= {f"{PREFIX}{spec.name}.{part}": slot for part, slot in kind.file_slots(spec).items()}
        self._places: dict[str, Place] = {}  # where tensors go in an adapter if they can be copied unchanged
        biases = {names.key: names.bias for _, names in self._names if names.layer is not None}
        self._biases = {key: name for key, name in biases.items() if f"{key}.bias" in self._own}
        self._places |= {name: ("", f"{key}.bias".replace(".", "/")) for key, name in self._biases.items()}
        for spec, names in self._names:
            factors, key = list(TERMS[LORA].file_slots(spec)), spec.name.replace(".", "/")
            self._places[PREFIX + spec.name] = "", key
            self._places |= {names.a: (key, factors[0]), names.b: (key, factors[1])}
        self._buffers = {spec.name for spec, _ in self._names if spec.buffer}
        self.highest = max([ALWAYS_ALLOWED_RANK, *(max(spec.matrix) for spec in group.tensors if spec.adaptable)])
        self.num_bytes = file_limit(self.slots, self.highest)

    def read(
        self, config: bytes, content: bytes, site: Site, where: Sequence[str]
    ) -> tuple[StageAdapter, LoraConfig, dict[str, str]]:
        """Read the adapter of the denoiser at ``site``.

        Args:
            config: the bytes of ``adapter_config.json``.
            content: the bytes of the safetensors file.
            site: the position of the denoiser.
            where: the paths of the two files, for error messages.

        Returns:
            The adapter, its config, and the metadata of the safetensors file.

        Raises:
            LoRunError: damaged files, or an adapter for another denoiser; see :meth:`adapter`.
        """
        file_config = self._file_config(config, where[0])
        length = int.from_bytes(content[:8], "little")
        key = config, content[: 8 + length], len(content)
        if (known := self._templates.get(key)) is not None:
            filled, names = known[0].filled(content), [name.replace("/", ".") for name in known[0].adapter._modules]
            if filled is not None and self._problem(names, file_config, site) is None:
                return filled, file_config.lora_config, known[1]
        tensors, metadata = parse_tensors(content, self.slots, where[1], self.highest)
        adapter = self.adapter(tensors, file_config, site, where[1])
        differences = self._differences(tensors, file_config)
        template = template_of(content, tensors, self._places, differences, adapter)
        if template is not None and len(self._templates) < MAX_CONFIGS:
            self._templates[key] = template, metadata
        return adapter, file_config.lora_config, metadata

    def _differences(self, tensors: Mapping[str, Tensor], file_config: FileConfig) -> dict[str, Difference | None]:
        """What the biases that a file has as differences are computed from; None for those it has as they are."""
        found: dict[str, Difference | None] = {}
        for key, name in self._biases.items():
            if name in tensors:
                base = self._denoiser.get_parameter(f"{key}.bias").detach()
                read = f"{PREFIX}{key}.bias" not in tensors
                found[name] = Difference(base, file_config.scaling(key, file_config.rank(key))) if read else None
        return found

    def _file_config(self, content: bytes, where: str) -> FileConfig:
        """Parse a config.

        Raises:
            LoRunError: as :func:`config_from_json`.
        """
        if (known := self._configs.get(content)) is not None:  # not `in`: another thread may clear the cache
            return known
        options = parse_json(content, where)
        found = FileConfig(config_from_json(options, where, len(self.group.tensors)))
        beside_layers = [n.key for spec, n in self._names if n.layer is None and spec.name in self._adaptable]
        found.lora_config.target_parameters = [name for name in beside_layers if found.targets(name)] or None
        if not options.get("lora_dropout"):  # parsing a config with dropout must warn each time
            if len(self._configs) >= MAX_CONFIGS:
                self._configs.clear()
            self._configs[content] = found
        return found

    def adapter(self, tensors: Mapping[str, Tensor], file_config: FileConfig, site: Site, where: str) -> StageAdapter:
        """Make the adapter of the denoiser at ``site`` from the tensors of a file.

        Tensors that an adapter of PEFT neither targets nor saves are those of the base. A rank above a tensor's limit
        is reduced to the limit, with a warning; the product stays the same.

        Args:
            tensors: the tensors of the file, which have been checked to match ``slots``.
            file_config: the config of the file.
            site: the position of the denoiser.
            where: the path of the file, for error messages.

        Raises:
            LoRunError: a missing or an extra tensor, a rank that differs from the config, NaN or Inf; a denoiser for
                which PEFT's layers compute something else than the adapter would.
        """
        remaining = dict(tensors)
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
                pair = [remaining.pop(name) for name in (names.a, names.b) if name in remaining]
            if len(pair) == 1:
                raise fail(f"both factors of {spec.name!r}", "one")
            if self._other_kinds and (other := self._other_term(spec, remaining, base.device)) is not None:
                if pair:
                    raise fail(f"one kind of adapter for {spec.name!r}", "two")
                terms[spec.name] = other
                continue
            # If a file has both the factors and the whole tensor, they are two forms of the same tensor for PEFT.
            if pair and (file_config.saved(spec) or PREFIX + spec.name not in remaining):
                remaining.pop(PREFIX + spec.name, None)
                rank = file_config.rank(names.key)
                found = [factor.shape[side.index(None)] for factor, side in zip(pair, (names.a_shape, names.b_shape))]
                if found != [rank, rank]:
                    raise fail(f"factors of rank {rank} for {spec.name!r}, as in its config", f"ranks {found}")
                terms[spec.name] = _term(spec, pair, file_config.scaling(names.key, rank), base, where)
                no_bias = names.bias if names.layer is not None and f"{names.key}.bias" not in self._own else None
                if no_bias in remaining and bool(remaining.pop(no_bias).any()):
                    raise fail(f"no bias for {names.key!r}, which has none in the network", "one")
                continue
            if names.layer is not None and not pair and file_config.targets(names.key) and not file_config.saved(spec):
                raise fail(f"the factors of {spec.name!r}, which the config targets", "none")
            value = remaining.pop(PREFIX + spec.name, None)
            layer = spec.name.removesuffix(".bias")
            if layer != spec.name and factor_name(layer) in tensors:
                difference = remaining.pop(bias_name(layer), None)
                if value is None and difference is not None:
                    value = bias_of(base.detach(), difference, file_config.scaling(layer, file_config.rank(layer)))
                if value is None and file_config.lora_bias:
                    raise fail(f"the bias of {layer!r}, since the config has lora_bias", "none")
            if value is None and (file_config.requires_all or file_config.saved(spec)):
                raise fail(f"the tensor {spec.name!r}", "none")
            private[spec.name] = base.detach().clone() if value is None else value.to(base)
        if remaining:
            raise fail(
                f"only the tensors of {self.group.name!r} that the config names", f"{sorted(remaining)[0]!r} as well"
            )
        problem = self._problem(terms, file_config, site)
        if problem is not None:
            raise LoRunError(
                f"cannot load the adapter in {where}, since PEFT would compute something else with it ({problem}): "
                "convert the network with another config, or fine-tune a set here"
            )
        if (name := _invalid(terms, private, self._buffers)) is not None:
            raise LoRunError(
                f"{name!r} or its scaling has NaN or Inf in {where}: download it again, or save weights from before "
                "training diverged"
            )
        return make_adapter(self.group, terms, private)

    def _other_term(self, spec: TensorSpec, remaining: dict[str, Tensor], device: torch.device) -> Term | None:
        """Return a tensor's term if it is of another kind than LoRA; remove its tensors from ``remaining``."""
        found: list[tuple[type[Term], dict[str, tuple[str, Slot]]]] = []
        for kind in self._other_kinds if spec.adaptable else ():
            slots = {f"{PREFIX}{spec.name}.{part}": (part, slot) for part, slot in kind.file_slots(spec).items()}
            if all(name in remaining for name in slots):
                found.append((kind, slots))
        if not found:
            return None
        kind, slots = max(found, key=lambda item: len(item[1]))  # a kind may have all the tensors of another, and more
        # A file may be in another dtype than the network.
        return kind.from_file(
            {part: remaining.pop(name).to(device, slot.dtype) for name, (part, slot) in slots.items()}
        )

    def _problem(self, terms: Iterable[str], file_config: FileConfig, site: Site) -> str | None:
        """Return the reason why PEFT would compute something else; None if it would not, or cannot load the file."""
        if file_config.requires_all:
            return None
        key = site.module, frozenset(terms)
        if key not in self._problems:
            layers = {name.rpartition(".")[0] for name in terms}
            denoiser = self.base.get_submodule(site.module)
            first = base_denoiser(self.base, self.stage_map, self.group, site)
            self._problems[key] = layer_problem(denoiser, first, layers)
        for spec, _ in self._names:
            if len(spec.aliases) > 1 and (spec.name in terms or file_config.saved(spec)):
                return f"{spec.name!r} is tied"
        return self._problems[key]


def _invalid(terms: Mapping[str, Term], private: Mapping[str, Tensor], buffers: Collection[str]) -> str | None:
    """Return the name of the first tensor with invalid values; None if all are valid."""
    held = [(name, tensors) for name, term in terms.items() for tensors in (term._parameters, term._buffers)]
    tensors = [(name, tensor, False) for name, part in held for tensor in part.values() if tensor is not None]
    tensors += [(name, tensor, name in buffers) for name, tensor in private.items()]
    # Check the sum of all tensors first, which is finite only if all values are: checking each tensor takes longer than
    # reading the file.
    floats = [tensor.detach().flatten() for _, tensor, _ in tensors if tensor.is_floating_point()]
    if len(floats) == len(tensors) > 0 and math.isfinite(torch.cat(floats).sum().item()):
        return None
    return next((name for name, tensor, buffer in tensors if not has_valid_values(tensor, buffer)), None)


def _term(spec: TensorSpec, pair: Sequence[Tensor], scaling: float, base: Tensor, where: str) -> Term:
    """Return the term with a file's factors A and B, with the rank reduced to the tensor's limit."""
    rows, columns = spec.matrix
    a, b = pair[0].reshape(-1, columns), pair[1].reshape(rows, -1)
    limit = min(rows, columns)
    if len(a) > limit:
        warnings.warn(
            f"rank {len(a)} is above the limit of {spec.name!r} in {where}: {limit} is used, with the same product",
            stacklevel=2,
        )
        exact = double_of(base)
        product = b.to(exact) @ a.to(exact)
        a, b = (product, torch.eye(rows)) if rows <= columns else (torch.eye(columns), product)
    return TERMS[LORA].from_lora(LoraFactors(a.to(base), b.to(base), scaling))


class FileConfig:
    """A file's config: the tensors that the file must hold, and their ranks and scalings.

    Attributes:
        requires_all: whether the file must hold all tensors of the stage, as the files that PEFT refuses do.
        lora_config: the config to make another set with, see ``add_adapter``.
    """

    def __init__(self, config: LoraConfig) -> None:
        ranks = config.rank_pattern or {}
        self.requires_all = ranks.get(REFUSED) == 0
        self.lora_config = copy.copy(config)
        self._ranks: dict[str, int] = {key: rank for key, rank in ranks.items() if (key, rank) != (REFUSED, 0)}
        self._alphas: dict[str, float] = config.alpha_pattern or {}
        self.lora_config.rank_pattern = self._ranks
        self.lora_bias = config.lora_bias
        # Cached, since matching patterns is slow and every stage asks again.
        self.rank, self.scaling = functools.cache(self._rank), functools.cache(self._scaling)
        self.targets, self.saved = functools.cache(self._targets), functools.cache(self._saved)

    def _rank(self, key: str) -> int:
        return self._ranks.get(get_pattern_key(list(self._ranks), key), self.lora_config.r)

    def _scaling(self, key: str, rank: int) -> float:
        alpha = self._alphas.get(get_pattern_key(list(self._alphas), key), self.lora_config.lora_alpha)
        return alpha / math.sqrt(rank) if self.lora_config.use_rslora else alpha / rank

    def _targets(self, module: str) -> bool:
        return self.lora_config.target_modules is not None and bool(
            check_target_module_exists(self.lora_config, module)
        )

    def _saved(self, spec: TensorSpec) -> bool:
        """Whether ``modules_to_save`` covers a tensor; by PEFT's rule, a module's name must end with an entry."""
        for alias in spec.aliases:
            parts = alias.split(".")[:-1]
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if any(name.endswith(saved) for saved in self.lora_config.modules_to_save or ()):
                    return True
        return False
