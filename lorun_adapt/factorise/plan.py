"""Choose the tensors that get a low-rank term, and its rank, as PEFT's ``LoraConfig`` says."""

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
    """The plan for the tensors of a group.

    Attributes:
        settings: by name, the rank and scaling of each tensor that gets a term.
        kept: the tensors that ``modules_to_save`` keeps as they are. All others are private to each stage as well.
    """

    settings: dict[str, Setting]
    kept: frozenset[str]


def plan(dun: nn.Module, stage_map: StageMap, config: LoraConfig) -> dict[str, Plan]:
    """Plan which tensors of each group get a low-rank term.

    PEFT's own functions match the names in the config, relative to the denoiser. Without ``target_modules`` and
    ``target_parameters``, every tensor is adapted whose pair is smaller than the tensor itself.

    >>> from lorun_adapt import find_stages
    >>> net = nn.Module()
    >>> net.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)) for _ in range(3))
    >>> plans = plan(net, find_stages(net), LoraConfig(r=2, lora_alpha=4, target_modules=["1"]))
    >>> next(iter(plans.values())).settings
    {'1.weight': Setting(rank=2, scaling=2.0)}

    Returns:
        A plan for each group of the stage map, by name.

    Raises:
        LoRunError: :func:`check_config` refuses the config, or a name in it matches nothing.
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
        settings = {
            spec.name: setting
            for spec in group.tensors
            if spec.name not in kept and (setting := matches.setting(spec)) is not None
        }
        plans[group.name] = Plan(settings, frozenset(kept))
    matches.check_all_used()
    return plans


class _Matches:
    """Matches a config's names with tensors, and records which of them matched."""

    def __init__(self, config: LoraConfig) -> None:
        self.config, self.kind = config, kind_of(config.peft_type)
        self.by_name = config.target_modules is not None or config.target_parameters is not None
        self.targets = copy.copy(config)
        if not self.by_name:
            self.targets.target_modules = ".*"  # PEFT's function then checks exclude_modules only
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            self.targets.target_modules = ".*"
        self.linear_only = self.targets.target_modules == ".*" and self.by_name and config.target_modules != ".*"
        self.met_target = False
        self.met_saved: set[str] = set()

    def saved(self, module: str) -> bool:
        """Whether ``modules_to_save`` has a module; by PEFT's rule, if the end of the module's name matches."""
        met = {name for name in self.config.modules_to_save or () if module.endswith(name)}
        self.met_saved |= met
        return bool(met)

    def setting(self, spec: TensorSpec) -> Setting | None:
        """The setting of a tensor's term; None if the tensor gets no term."""
        for alias in spec.aliases:
            module, _, attribute = alias.rpartition(".")
            if self._parameter(alias):
                return self._named(spec, alias)
            if check_target_module_exists(self.targets, module):
                if not self.by_name:
                    setting = self._setting(module if issubclass(spec.owner, LAYERS) else alias)
                    smaller = spec.adaptable and self.kind.size(spec, setting.rank) < spec.numel
                    return setting if smaller else None
                if spec.adaptable and (not self.linear_only or issubclass(spec.owner, nn.Linear)):
                    return self._named(spec, module)
        return None

    def _parameter(self, name: str) -> bool:
        # The rule of peft.tuners.tuners_utils.BaseTuner._inject_parameters (PEFT 0.21).
        return any(name == target or name.endswith("." + target) for target in self.config.target_parameters or ())

    def _named(self, spec: TensorSpec, key: str) -> Setting:
        """The setting of a tensor that the config names; it gets a term even if that is larger than the tensor."""
        if not spec.adaptable:
            raise LoRunError(
                f"expected a target with two dimensions or more, found {spec.name!r} of shape {spec.shape}"
                f"{' in a recurrent layer' if issubclass(spec.owner, nn.RNNBase) else ''}: leave it out of the targets"
            )
        self.met_target = True
        setting = self._setting(key)
        limit = self.kind.highest_rank(spec)
        if limit is not None and setting.rank > limit:
            warnings.warn(f"rank {setting.rank} is above the limit of {spec.name!r}: {limit} is used", stacklevel=2)
            setting = Setting(limit, setting.scaling)
        elif self.kind.size(spec, setting.rank) > spec.numel:
            warnings.warn(
                f"the rank-{setting.rank} term of {spec.name!r} is larger than the tensor itself", stacklevel=2
            )
        return setting

    def _setting(self, key: str) -> Setting:
        config = self.config
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), key), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), key), config.lora_alpha)
        return Setting(rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        config = self.config
        if self.by_name and not self.met_target:
            raise LoRunError(
                f"target_modules={_shown(config.target_modules)} and "
                f"target_parameters={_shown(config.target_parameters)} match no tensor of a denoiser: give names "
                "relative to the denoiser, as find_stages shows them"
            )
        for name in config.modules_to_save or ():
            if name not in self.met_saved:
                raise LoRunError(
                    f"{name!r} in modules_to_save is no module of a denoiser: give names relative to the denoiser"
                )


def _shown(names: object) -> str:
    return repr(sorted(names)) if isinstance(names, (set, list, tuple)) else repr(names)
