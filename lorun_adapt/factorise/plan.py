"""Which tensors get a low-rank term and at what rank: PEFT's ``LoraConfig`` read for a denoiser."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import LoRunError
from ..peft_format.options import check_config
from ..stages.fold import LAYERS
from ..stages.stage_map import StageMap, TensorSpec
from ..terms.registry import kind_of
from ..terms.term import Setting


@dataclass(frozen=True)
class Plan:
    """What becomes of a group's tensors: those with a term, and those to be kept as they are by request."""

    terms: dict[str, Setting]
    kept: frozenset[str]


def plan(dun: nn.Module, stage_map: StageMap, config: LoraConfig) -> dict[str, Plan]:
    """For each group, the tensors that get a low-rank term; all others stay private.

    Names in the config are matched by PEFT's own functions, relative to the denoiser. Without
    ``target_modules`` and ``target_parameters`` every tensor is adapted whose pair is smaller
    than itself.

    Raises:
        LoRunError: what :func:`check_config` refuses, or names that match nothing.
    """
    check_config(config)
    matches = _Matches(config)
    plans = {}
    for group in stage_map.groups:
        denoiser = dun.get_submodule(group.sites[0].module)
        modules = [name for name, _ in denoiser.named_modules(remove_duplicate=False)]
        saved = [name for name in modules if name and matches.saved(name)]
        kept = {
            spec.name
            for spec in group.tensors
            for alias in spec.aliases
            if any(alias.startswith(f"{n}.") for n in saved)
        }
        terms = {
            spec.name: term
            for spec in group.tensors
            if spec.name not in kept and (term := matches.term(spec)) is not None
        }
        plans[group.name] = Plan(terms, frozenset(kept))
    matches.check_all_used()
    return plans


class _Matches:
    """A config's names against tensors, and which of them were met."""

    def __init__(self, config: LoraConfig) -> None:
        self.config, self.kind = config, kind_of(config.peft_type)
        self.by_name = config.target_modules is not None or config.target_parameters is not None
        self.targets = copy.copy(config)
        if not self.by_name:
            self.targets.target_modules = ".*"  # so that PEFT's function tells exclusions alone
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            self.targets.target_modules = ".*"
        self.linear_only = self.targets.target_modules == ".*" and self.by_name and config.target_modules != ".*"
        self.met_target = False
        self.met_saved: set[str] = set()

    def saved(self, module: str) -> bool:
        """Whether a module stays private by request (PEFT's rule: the name ends so)."""
        met = {name for name in self.config.modules_to_save or () if module.endswith(name)}
        self.met_saved |= met
        return bool(met)

    def term(self, spec: TensorSpec) -> Setting | None:
        for alias in spec.aliases:
            module, _, attribute = alias.rpartition(".")
            if self._parameter(alias):
                return self._named(spec, alias)
            if check_target_module_exists(self.targets, module):
                if not self.by_name:
                    term = self._term(module if issubclass(spec.owner, LAYERS) else alias)
                    smaller = spec.adaptable and self.kind.size(spec, term.rank) < spec.numel
                    return term if smaller else None
                if spec.adaptable and (not self.linear_only or issubclass(spec.owner, nn.Linear)):
                    return self._named(spec, module)
        return None

    def _parameter(self, name: str) -> bool:
        # The rule of peft.tuners.tuners_utils.BaseTuner._inject_parameters (PEFT 0.21).
        return any(name == target or name.endswith("." + target) for target in self.config.target_parameters or ())

    def _named(self, spec: TensorSpec, key: str) -> Setting:
        """A term that was asked for by name: made, whatever its size."""
        if not spec.adaptable:
            raise LoRunError(
                f"expected a target with two dimensions or more, found {spec.name!r} of shape {spec.shape}"
                f"{' in a recurrent layer' if issubclass(spec.owner, nn.RNNBase) else ''}: leave it out of the targets"
            )
        self.met_target = True
        term = self._term(key)
        limit = self.kind.highest_rank(spec)
        if limit is not None and term.rank > limit:
            warnings.warn(f"rank {term.rank} is above the limit of {spec.name!r}: {limit} is used", stacklevel=2)
            term = Setting(limit, term.scaling)
        elif self.kind.size(spec, term.rank) > spec.numel:
            warnings.warn(f"the rank-{term.rank} term of {spec.name!r} is larger than the tensor itself", stacklevel=2)
        return term

    def _term(self, key: str) -> Setting:
        config = self.config
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
        return Setting(rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        config = self.config
        if self.by_name and not self.met_target:
            raise LoRunError(
                f"expected target_modules={_shown(config.target_modules)} or "
                f"target_parameters={_shown(config.target_parameters)} to match in a denoiser, found no tensor: "
                "give names relative to the denoiser, as find_stages shows them"
            )
        for name in config.modules_to_save or ():
            if name not in self.met_saved:
                raise LoRunError(
                    f"expected modules_to_save to name modules of a denoiser, found {name!r}: give names relative to it"
                )


def _shown(names: object) -> str:
    return repr(sorted(names)) if isinstance(names, (set, list, tuple)) else repr(names)
