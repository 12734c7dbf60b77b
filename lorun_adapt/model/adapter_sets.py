"""A network whose stages run with sets of adapters on one base, and the swap from one set to another.

A swap is one assignment: networks that have run before are kept ready, and a forward that runs meanwhile
ends on the network that it began with.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..errors import LoRunError
from ..files.layout import is_adapter_name
from ..files.sets import load_set
from ..network.adapter import StageAdapter, private_tensors
from ..network.assemble import assemble
from ..network.calls import count_while_compiling, counting
from ..network.converted import AdapterInfo, AdapterSet, Card
from ..network.sharing import share_again, shared_places
from ..peft_format.reader import Reader, readers_of
from ..stages.stage_map import Group, Site, StageMap, stage_key
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors
from .combine import weighted_set
from .ready import ReadyNetworks
from .state_dict import register_hooks

if TYPE_CHECKING:
    import os

    from typing_extensions import Self


class _Held(NamedTuple):
    """What there is of a set."""

    adapters: nn.ModuleDict
    outside: StageAdapter | None
    config: LoraConfig
    info: AdapterInfo


class AdapterSets(nn.Module):
    """What of :class:`LoRunModel` runs: base, sets of adapters, and the network that they make."""

    def __init__(
        self,
        base: nn.Module,
        stage_map: StageMap,
        sets: Mapping[str, AdapterSet],
        residuals: Mapping[str, Mapping[str, list[tuple[float, float]]]],
        *,
        trainable: set[str],
        active: Mapping[int, str] | None = None,
        fingerprint: str | None = None,
        card: Card | None = None,
    ) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = base
        self.adapters = nn.ModuleDict()
        self.outside = nn.ModuleDict()
        self.stage_map = stage_map
        self.peft_config: dict[str, LoraConfig] = {}
        self.adapter_info: dict[str, AdapterInfo] = {}
        self.residuals = {group: dict(tensors) for group, tensors in residuals.items()}
        self.trainable = set(trainable)
        self.card = card or Card()
        self._looped = any(site.call is not None for group in stage_map.groups for site in group.sites)
        self._active: dict[int, str] = {}
        self._inference_mode = False
        self._ready = ReadyNetworks()
        self._swapping = threading.RLock()
        self._readers: dict[tuple[str, str], Reader] = {}
        self.descriptions: dict[bytes, dict[str, Any]] = {}  # of folders with adapters for this base, by their bytes
        self._fingerprint = fingerprint
        self._base_parameters = list(base.parameters())  # which take long to list
        self.network = base
        for name, found in sets.items():
            self._put_set(name, found)
        self.training = base.training
        register_hooks(self)
        self.set_adapter(next(iter(sets)) if active is None else active)

    @property
    def fingerprint(self) -> str:
        """What names the base in files: the same for a base that was stored, or moved, to another dtype."""
        if self._fingerprint is None or any(p.requires_grad for p in self._base_parameters):
            self._fingerprint = fingerprint_of(distinct_tensors(self.base))
            self.descriptions.clear()  # which are of folders for the base as it was
        return self._fingerprint

    @property
    def readers(self) -> dict[tuple[str, str], Reader]:
        """What reads the adapters' files, by group and module."""
        if not self._readers:
            self._readers = readers_of(self.base, self.stage_map)
        return self._readers

    # --- running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original network returns for the same arguments."""
        network = self.network
        if not self._looped:
            return network(*args, **kwargs)
        if torch.compiler.is_compiling():
            count_while_compiling(network)
            return network(*args, **kwargs)
        with counting():
            return network(*args, **kwargs)

    # --- adapters --------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The loaded adapter sets."""
        return list(self.adapters)

    @property
    def active_adapters(self) -> dict[int, str]:
        """The set that each stage runs with."""
        return dict(self._active)

    def set_adapter(self, adapter: str | Mapping[int, str], inference_mode: bool = False) -> None:
        """Run with another set in all stages, or, with ``{stage: name}``, in some.

        Forwards may run meanwhile in other threads: each runs with the sets it began with, or with the new ones.
        What a set has of its own outside the stages runs where all stages run with it.

        Args:
            adapter: the name of a set, or such names by stage.
            inference_mode: freeze the sets that run, too. Else they train, as in PEFT, and a network compiled
                for sets that train is compiled anew for frozen ones.

        Raises:
            LoRunError: an unknown set or stage, or a set without the stage; nothing changes then.
        """
        stages, held = range(len(self.stage_map)), self.adapters._modules
        with self._swapping:
            wanted = dict.fromkeys(stages, adapter) if isinstance(adapter, str) else {**self._active, **adapter}
            for stage, name in wanted.items():
                if stage not in stages:
                    raise LoRunError(
                        f"expected a stage in 0..{len(stages) - 1}, found {stage!r}: see print(lorun.stage_map)"
                    )
                if name not in held:
                    raise LoRunError(f"expected an adapter among {self.adapter_names}, found {name!r}: load it first")
                _check_held(name, stage, held[name])
            network = self._ready_for(wanted)
            before = self._active.values()
            self._active, self._inference_mode, self.network = wanted, inference_mode, network
            self._freeze_what_rests([*before, *wanted.values()])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the bare base in every stage within the ``with`` block."""
        with self._swapping:
            before, self.network = self.network, self.base
        try:
            yield
        finally:
            if before is not self.base:  # else within another `with`
                with self._swapping:
                    self.network = self._ready_for(self._active)

    def load_adapter(
        self,
        source: str | os.PathLike[str],
        adapter_name: str,
        stage: int | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a set, or one stage's adapter, under a name; it runs once :meth:`set_adapter` says so.

        Args:
            source: a saved folder (its set of that name, or its only one), the folder of a set, or, with ``stage``,
                the folder of a single stage or its safetensors file beside its ``adapter_config.json``; or a
                repository of the Hub, as ``user/name``, of which only the files needed are downloaded.
            adapter_name: letters, digits, ``_`` and ``-``. A loaded set of that name is replaced;
                with ``stage`` only that stage is.
            stage: load this stage's adapter alone.
            revision, subfolder, token, cache_dir, local_files_only: of the repository, as
                ``huggingface_hub.hf_hub_download`` takes them.

        Raises:
            LoRunError: files that are missing, damaged or not for this base; nothing changes then.
        """
        check_adapter_name(adapter_name)
        found = load_set(
            self,
            source,
            adapter_name,
            stage,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        with self._swapping:
            if stage is not None and adapter_name in self.adapters:
                before = self._set(adapter_name)
                about = dataclasses.replace(before.info, measured=())
                adapters = {**before.adapters, **found.adapters}
                found = dataclasses.replace(before, adapters=adapters, config=found.config, info=about)
            self._put_set(adapter_name, found)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Make a set of the weighted sum of what others add to the base, as PEFT does with ``combination_type="svd"``.

        A tensor's low-rank terms become one of the largest of their ranks, by SVD of their sum; of the stages' own
        tensors the differences from the base are summed. Weights that sum to 1 interpolate. The new set holds the
        stages that all of the others hold.

        Args:
            adapters, weights: names of loaded sets, and for each a number, which may be negative.
            adapter_name: the new set's name; a set of that name is replaced.

        Raises:
            LoRunError: an unknown set, lists of different length, or sums that are not finite; nothing changes then.
        """
        check_adapter_name(adapter_name)
        with self._swapping:
            self._put_set(adapter_name, weighted_set(self, adapters, weights))

    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Make a set that begins as another and is apart from it.

        Raises:
            LoRunError: an unknown set, or a name that is taken; nothing changes then.
        """
        check_adapter_name(adapter_name)
        with self._swapping:
            if source not in self.adapters or adapter_name in self.adapters:
                raise LoRunError(
                    f"expected a set among {self.adapter_names} to copy, and a new name, found {source!r} and "
                    f"{adapter_name!r}: choose others"
                )
            self._put_set(adapter_name, copy.deepcopy(self._set(source)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a set that no stage runs with.

        Raises:
            LoRunError: an unknown set, or one in use.
        """
        with self._swapping:
            if adapter_name not in self.adapters:
                raise LoRunError(
                    f"expected an adapter among {self.adapter_names}, found {adapter_name!r}: nothing to delete"
                )
            if adapter_name in self._active.values():
                raise LoRunError(
                    f"expected an adapter that is not in use, found {adapter_name!r}: set another one first"
                )
            self._ready.forget(adapter_name)
            self._hold(adapter_name, None)

    # --- torch -----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Buffers, and under some of torch's settings parameters too, are replaced place by place,
        # which would leave each place with a tensor of its own.
        _ = self.fingerprint  # of the base as it was before a change of dtype
        shared = shared_places(self.base, self.adapters)
        super()._apply(fn, recurse)
        share_again(shared)
        self._assemble_again()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._swapping)] = threading.RLock()  # a lock can't be copied
        twin.__dict__ = copy.deepcopy({**self.__dict__, "_ready": ReadyNetworks(), "_readers": {}}, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LoRunError(
            "expected no pickling of a LoRunModel (torch.save, pickle, a spawned process), found it: use "
            "save_pretrained, or torch.save its state_dict()"
        )

    # --- within ----------------------------------------------------------------------------------

    def _assemble_again(self) -> None:
        """Put the network together anew around tensors that have been replaced."""
        self._base_parameters = list(self.base.parameters())
        self.descriptions.clear()
        self._ready.clear()
        self._readers = {}
        if self.network is not self.base:
            self.network = self._ready_for(self._active)

    def _ready_for(self, active: Mapping[int, str]) -> nn.Module:
        """The network of a choice of sets, its modules in the modes of those that run now."""
        key = tuple(active[stage] for stage in range(len(self.stage_map)))
        return self._ready.network(key, lambda: self._assembled(active), self.network, self.training)

    def _assembled(self, active: Mapping[int, str]) -> nn.Module:
        return assemble(self.base, self.stage_map, self._choice(active), self._outside_for(active))

    def _outside_for(self, active: Mapping[int, str]) -> dict[str, Tensor]:
        """The parameters outside the stages, other than the base's: of the set that all stages run with."""
        names = set(active.values())
        return self.outside_of(names.pop()) if len(names) == 1 else {}

    def _put_set(self, name: str, found: AdapterSet) -> None:
        """Hold a set under a name, in the place of one that has it and, where that runs, run it."""
        held: dict[int, dict[str, StageAdapter]] = {}
        for (group, site), adapter in found.adapters.items():
            held.setdefault(site.stage, {})[group] = adapter
        new = _module_dict({stage_key(s): _module_dict(held[s]) for s in sorted(held)})
        for stage, active in self._active.items():
            if active == name:
                _check_held(name, stage, new)
        outside = None
        if found.outside:
            frozen = [key for key in found.outside if self.trainable and key not in self.trainable]
            own = {
                key: v if isinstance(v, nn.Parameter) else nn.Parameter(v, False) for key, v in found.outside.items()
            }
            outside = StageAdapter({}, own, frozen)
        self._run_with(name, _Held(new, outside, found.config, found.info))

    def _held(self, name: str) -> _Held | None:
        if name not in self.adapters:
            return None
        outside = self.outside[name] if name in self.outside else None
        return _Held(self.adapters[name], outside, self.peft_config[name], self.adapter_info[name])

    def _hold(self, name: str, found: _Held | None) -> None:
        places = (self.adapters, self.outside, self.peft_config, self.adapter_info)
        for place, value in zip(places, found or (None,) * len(places)):
            if value is not None:
                place[name] = value
            elif name in place:
                del place[name]

    def _run_with(self, name: str, found: _Held) -> None:
        """Hold a set, and put the network that runs together again where it runs with that set."""
        before = self._held(name)
        self._hold(name, found)
        self._ready.forget(name)
        if name in self._active.values() and self.network is not self.base:
            try:
                self.network = self._ready_for(self._active)
            except BaseException:
                self._hold(name, before)
                raise
        self._freeze_what_rests([name])

    def _freeze_what_rests(self, names: Iterable[str]) -> None:
        """Let of these sets the adapters train that run, or none of them, and no others."""
        for name in set(names):
            running = {stage_key(stage) for stage, active in self._active.items() if active == name}
            for key, groups in self.adapters[name].items():
                for adapter in groups.values():
                    adapter.train_only_if(key in running and not self._inference_mode)
            if name in self.outside:
                alone = set(self._active.values()) == {name}
                self.outside[name].train_only_if(alone and not self._inference_mode)

    def _set(self, name: str) -> AdapterSet:
        adapters = {
            (group.name, site): self.adapter_of(group, site, name)
            for group in self.stage_map.groups
            for site in group.sites
            if stage_key(site.stage) in self.adapters[name]
        }
        return AdapterSet(adapters, self.peft_config[name], self.outside_of(name), self.adapter_info[name])

    def _choice(self, active: Mapping[int, str]) -> dict[tuple[str, Site], StageAdapter]:
        return {
            (group.name, site): self.adapter_of(group, site, active[site.stage])
            for group in self.stage_map.groups
            for site in group.sites
        }

    def outside_of(self, name: str) -> dict[str, Tensor]:
        """The parameters outside the stages that a set brings with it, by name."""
        return private_tensors(self.outside[name]) if name in self.outside else {}

    def outside_that_runs(self) -> dict[str, Tensor]:
        """Those that take the place of the base's: of the set that all stages run with, by name."""
        return self._outside_for(self._active)

    def adapter_of(self, group: Group, site: Site, name: str | None = None) -> StageAdapter:
        """The adapter of one denoiser: of the set ``name``, or of the one its stage runs with."""
        return self.adapters[name or self._active[site.stage]][stage_key(site.stage)][group.name]


def _module_dict(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Of modules whose names are known to be right, as to check each takes long."""
    found = nn.ModuleDict()
    found._modules.update(modules)
    return found


def _check_held(name: str, stage: int, adapters: nn.ModuleDict) -> None:
    if stage_key(stage) not in adapters._modules:
        held = [int(key.split("_")[1]) for key in adapters]
        raise LoRunError(
            f"expected adapter {name!r} to hold stage {stage}, found only {held}: "
            "name the stages that it is for, as {stage: name}"
        )


def check_adapter_name(name: str) -> None:
    """Names become folders and attributes.

    Raises:
        LoRunError: a name that can't.
    """
    if not is_adapter_name(name):
        raise LoRunError(f"expected an adapter name of letters, digits, _ and -, found {name!r}: choose another")
