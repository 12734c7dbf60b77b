"""The adapter sets of a network, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from peft import LoraConfig
from torch import nn

from ..errors import LoRunError
from ..files.layout import INTERPOLATED, is_adapter_name
from ..network.adapter import StageAdapter, private_tensors
from ..network.converted import AdapterInfo, AdapterSet
from ..stages.stage_map import stage_key


class SetStore:
    """Stores adapter sets by name.

    Attributes:
        adapters: the modules that the model registers, ``adapters[name]["stage_03"][group]``.
        outside: the parameters outside the stages that a set replaces, for each set that replaces some.
        configs: the ``LoraConfig`` of each set.
        infos: the noise level and the measured quality of each set.

    Args:
        trainable_names: names of the parameters that the original network trains; if empty, all of them.

    >>> import torch
    >>> from peft import LoraConfig
    >>> from lorun_adapt.model.set_store import SetStore
    >>> from lorun_adapt.network.adapter import StageAdapter
    >>> from lorun_adapt.network.converted import AdapterSet
    >>> store = SetStore()
    >>> adapter = StageAdapter({}, {"bias": torch.nn.Parameter(torch.zeros(2))})
    >>> store.put("default", AdapterSet({0: {"denoiser": adapter}}, LoraConfig()))
    >>> store.names, list(store.stages("default")), store.get("default").adapters[0]["denoiser"] is adapter
    (['default'], [0], True)
    """

    def __init__(self, trainable_names: Collection[str] = ()) -> None:
        self.adapters, self.outside = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {}
        self.infos: dict[str, AdapterInfo] = {}
        self._trainable_names = frozenset(trainable_names)
        # The same modules in dicts, which a swap iterates over much faster than over an nn.ModuleDict.
        self._stages: dict[str, dict[int, Mapping[str, StageAdapter]]] = {}
        self._outsides: dict[str, StageAdapter] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._stages

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    @property
    def names(self) -> list[str]:
        """The names of the sets, in the order in which they were added."""
        return list(self._stages)

    def put(self, name: str, held: AdapterSet) -> None:
        """Store a set, replacing one of that name."""
        self._stages[name] = {stage: dict(held.adapters[stage]) for stage in sorted(held.adapters)}
        stages = {stage_key(stage): _module_dict(adapters) for stage, adapters in self._stages[name].items()}
        self.adapters[name] = _module_dict(stages)
        if held.outside:
            frozen = [key for key in held.outside if self._trainable_names and key not in self._trainable_names]
            own = {
                key: value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
                for key, value in held.outside.items()
            }
            self.outside[name] = self._outsides[name] = StageAdapter({}, own, frozen)
        elif name in self._outsides:
            del self.outside[name], self._outsides[name]
        self.configs[name], self.infos[name] = held.config, held.info

    def get(self, name: str) -> AdapterSet:
        """Return a set; its tensors are shared, not copied.

        Raises:
            LoRunError: an unknown set.
        """
        self.check_known(name)
        outside = private_tensors(self._outsides[name]) if name in self._outsides else {}
        return AdapterSet(dict(self._stages[name]), self.configs[name], outside, self.infos[name])

    def drop(self, name: str) -> None:
        """Remove a set."""
        del self._stages[name], self.adapters[name], self.configs[name], self.infos[name]
        if name in self._outsides:
            del self._outsides[name], self.outside[name]

    def adapters_at(self, name: str, stage: int) -> Mapping[str, StageAdapter]:
        """Return the adapters of one stage of a set, by group."""
        return self._stages[name][stage]

    def stages(self, name: str) -> Collection[int]:
        """Return the stages for which a set has an adapter."""
        return self._stages[name].keys()

    def set_trainable(self, name: str, stages: Collection[int], outside: bool) -> None:
        """Make a set's adapters trainable in ``stages``, and freeze its others.

        Args:
            name: the set.
            stages: stages, counted from 0.
            outside: whether to make its parameters outside the stages trainable.
        """
        for stage, adapters in self._stages[name].items():
            for adapter in adapters.values():
                adapter.set_trainable(stage in stages)
        if name in self._outsides:
            self._outsides[name].set_trainable(outside)

    def check_known(self, name: object) -> None:
        """Raise an error unless a set of this name is stored.

        Raises:
            LoRunError: an unknown set.
        """
        if name not in self:
            raise LoRunError(f"no adapter set {name!r} among {self.names}: load it first, or name one of these")


def check_adapter_name(name: object) -> None:
    """Raise an error unless ``name`` can name a set. Names become folders and attributes.

    Raises:
        LoRunError: characters that are not allowed, or a reserved name.
    """
    if not is_adapter_name(name):
        raise LoRunError(f"an adapter set cannot be called {name!r}: use letters, digits, _ and -")
    if name == INTERPOLATED:
        raise LoRunError(f"the name {name!r} is reserved for the set that select_adapter makes: choose another name")


def _module_dict(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Return an nn.ModuleDict without its checks of each name, which are slow; the names are known to be valid."""
    result = nn.ModuleDict()
    result._modules.update(modules)
    return result
