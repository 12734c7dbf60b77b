"""What people would use instead: the same stages with PEFT's layers, or with PyTorch's parametrizations.

Each is written with the public library alone, shares the base's tensors as ours does, and computes the same.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import LoRunError
from ..files.layout import ADAPTERS_FOLDER
from ..model.lorun_model import LoRunModel
from ..network.adapter import StageAdapter, private_tensors, terms_of
from ..network.assemble import put_tensor
from ..peft_format.lora import fill_layer, peft_layer
from ..stages.stage_map import Group, Site, stage_key
from ..util.copying import copy_network
from ..util.modules import tensor_of

PEFT = "PEFT set_adapter"


class Unsuited(LoRunError):
    """The alternative cannot do what this network needs."""


def peft_layers(lorun: LoRunModel) -> nn.Module:
    """Return the network with a PEFT layer around each adapted layer of each stage.

    Tensors for which PEFT has no layer that computes the same are dense here, such as raw parameters.

    Raises:
        Unsuited: the stages are calls of one module, or none of the adapted tensors is one for a PEFT layer.
    """
    network, wrapped = _base_of(lorun), 0
    for site, group in lorun.stage_map.sites.items():
        module, adapter = network.get_submodule(site.module), lorun.adapter_of(group, site)
        terms = terms_of(adapter)
        layers = {name.removesuffix(".weight"): term for name, term in terms.items() if peft_layer(module, name)}
        for spec in group.tensors:
            if spec.name in terms and spec.name.removesuffix(".weight") not in layers:
                put_tensor(module, spec, terms[spec.name](tensor_of(module, spec.name)).detach())
        _put_private(module, group, adapter)
        if not layers:
            continue
        ranks = {name: term.rank for name, term in layers.items()}
        config = LoraConfig(r=1, lora_alpha=1, target_modules=list(layers), rank_pattern=ranks, alpha_pattern=ranks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, module)
        for name, term in layers.items():
            factors, layer = term.as_lora(), module.get_submodule(name)
            assert factors is not None
            fill_layer(layer, factors)
            wrapped += 1
    if not wrapped:
        raise Unsuited("PEFT has no layer for the tensors of this network")
    return network


class _Switching(nn.Module):
    """A stage that makes its own adapter the active one of a shared PEFT model."""

    def __init__(self, model: PeftModel, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, *args: object, **kwargs: object) -> object:
        self.model.set_adapter(self.stage)
        return self.model(*args, **kwargs)


def peft_set_adapter(lorun: LoRunModel) -> nn.Module:
    """Return the network with one PEFT model for all stages, which switch its adapter before they run.

    Raises:
        Unsuited: the stages are calls of one module, or PEFT cannot represent them.
    """
    network = _base_of(lorun)
    with tempfile.TemporaryDirectory() as scratch:
        lorun.save_pretrained(Path(scratch, "saved"), selected_adapters=[_set_of(lorun)])
        models = _peft_models(lorun, Path(scratch, "saved", ADAPTERS_FOLDER, _set_of(lorun)))
    for site, group in lorun.stage_map.sites.items():
        parent, _, attribute = site.module.rpartition(".")
        switching = _Switching(models[group.name], stage_key(site.stage))
        setattr(network.get_submodule(parent), attribute, switching)
    return network


def peft_swaps(lorun: LoRunModel, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that activate an adapter for each stage in PEFT: loaded ones, and those of a set's folder.

    Raises:
        Unsuited: as :func:`peft_set_adapter`.
    """
    models = _peft_models(lorun, folder)

    def from_memory() -> None:
        for site, group in lorun.stage_map.sites.items():
            models[group.name].set_adapter(stage_key(site.stage))

    def from_disk() -> None:
        for site, group in lorun.stage_map.sites.items():
            models[group.name].load_adapter(_place(lorun, folder, group, site), stage_key(site.stage))

    return from_memory, from_disk


def _peft_models(lorun: LoRunModel, folder: Path) -> dict[str, PeftModel]:
    """A PEFT model for each group, with an adapter for each of its stages."""
    if not lorun.stage_map.shared:
        raise Unsuited("the stages share no base")
    models: dict[str, PeftModel] = {}
    for site, group in lorun.stage_map.sites.items():
        place, name = _place(lorun, folder, group, site), stage_key(site.stage)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if group.name in models:
                    models[group.name].load_adapter(place, name)
                else:
                    denoiser = copy_network(lorun.base.get_submodule(site.module), share_tensors=True)
                    models[group.name] = PeftModel.from_pretrained(denoiser, place, adapter_name=name)
        except Exception as error:  # PEFT raises many types
            raise Unsuited("PEFT cannot represent these stages") from error
    return models


def _place(lorun: LoRunModel, folder: Path, group: Group, site: Site) -> Path:
    place = folder / stage_key(site.stage)
    return place if len(lorun.stage_map.groups) == 1 else place / group.name


class _LowRank(nn.Module):
    """A plain parametrization, as in many tutorials."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, base: Tensor) -> Tensor:
        return base + (self.b @ self.a).view(base.shape)


def parametrized(lorun: LoRunModel) -> nn.Module:
    """Return the network with a parametrization of ``torch.nn.utils`` on each adapted tensor.

    Raises:
        Unsuited: the stages are calls of one module, or share modules.
    """
    network = _base_of(lorun)
    for site, group in lorun.stage_map.sites.items():
        module, adapter = network.get_submodule(site.module), lorun.adapter_of(group, site)
        _put_private(module, group, adapter)
        for name, term in terms_of(adapter).items():
            path, _, attribute = name.rpartition(".")
            layer, factors = module.get_submodule(path), term.as_lora()
            if factors is None:
                raise Unsuited("the terms are not low-rank")
            pair = _LowRank(factors.a.detach().clone(), (factors.b * factors.scaling).detach().clone())
            parametrize.register_parametrization(layer, attribute, pair)
    return network


def _base_of(lorun: LoRunModel) -> nn.Module:
    """A copy of the base that shares its tensors, if its stages are modules of their own."""
    sites = list(lorun.stage_map.sites)
    if any(site.call is not None for site in sites):
        raise Unsuited("its stages are calls of one module")
    network = copy_network(lorun.base, share_tensors=True)
    owned: dict[int, str] = {}
    for site in sites:
        for module in network.get_submodule(site.module).modules():
            if owned.setdefault(id(module), site.module) != site.module:
                raise Unsuited("its stages share modules")
    return network


def _set_of(lorun: LoRunModel) -> str:
    names = set(lorun.converted().active.values())
    if len(names) != 1:
        raise Unsuited("its stages run several sets")
    return names.pop()


def _put_private(module: nn.Module, group: Group, adapter: StageAdapter) -> None:
    private = private_tensors(adapter)
    for spec in group.tensors:
        if spec.name in private:
            put_tensor(module, spec, private[spec.name].detach().clone())


ALTERNATIVES: dict[str, Callable[[LoRunModel], nn.Module]] = {
    "PEFT layers": peft_layers,
    PEFT: peft_set_adapter,
    "parametrization": parametrized,
}
