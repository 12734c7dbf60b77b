"""Build networks whose stages share one base: the bare base, a network with adapters, a merged one.

A network that runs is a copy of the bare base that shares all of its tensors. Its stages read
their tensors through the adapters' low-rank terms. Copies are cheap, so that a swap of adapters
can be a new network put in the place of the old one, and a forward that runs meanwhile ends on
the network it began with.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .calls import tell_calls_apart
from .errors import LoRunError
from .lowrank import LowRank, add_term
from .stages import Group, Site, StageMap, TensorSpec, tensors_of

TWINS = "lorun_twins"  # of a network, those of its modules that run, in some stage, as a copy: with each of the copies


class StageAdapter(nn.Module):
    """What one stage adds to the base: low-rank terms, and the stage's own private tensors.

    Names are those of the tensors in the denoiser, with ``/`` for the dots. ``lorun_frozen`` are
    those that the network's authors don't train.
    """

    def __init__(
        self, lowrank: Mapping[str, LowRank], private: Mapping[str, Tensor], frozen: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.lorun_frozen = frozenset(name.replace(".", "/") for name in frozen)
        for name, term in lowrank.items():
            self.add_module(name.replace(".", "/"), term)
        for name, tensor in private.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "/"), tensor)
            else:
                self.register_buffer(name.replace(".", "/"), tensor)

    def train_only_if(self, trains: bool) -> None:
        """Let its tensors train, as far as the network's authors train them, or none of them."""
        # Past nn.Module.named_parameters, and in as few steps as can be: this runs for every stage at each swap.
        for name, term in self._modules.items():
            wanted = trains and name not in self.lorun_frozen
            for parameter in term._parameters.values():
                if parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)
        for name, parameter in self._parameters.items():
            wanted = trains and name not in self.lorun_frozen
            wanted = wanted and (parameter.is_floating_point() or parameter.is_complex())
            if parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)


def lowrank_terms(adapter: StageAdapter) -> dict[str, LowRank]:
    return {name.replace("/", "."): term for name, term in adapter._modules.items()}


def private_tensors(adapter: StageAdapter) -> dict[str, Tensor]:
    own = {**adapter._parameters, **adapter._buffers}
    return {name.replace("/", "."): tensor for name, tensor in own.items()}


Choice = Mapping[tuple[str, Site], StageAdapter]  # (group's name, site) -> its adapter


def copy_network(
    network: nn.Module, *, share_tensors: bool = False, memo: dict[int, object] | None = None
) -> nn.Module:
    """``copy.deepcopy`` of a network, or, with ``share_tensors``, of its modules around the same tensors.

    Activations that modules keep as attributes, which deepcopy refuses, are taken without their graph.
    """
    memo = {} if memo is None else memo
    if share_tensors:
        memo.update({id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(network, memo)


def share(network: nn.Module, group: Group, values: Mapping[str, Tensor]) -> None:
    """Give all sites of ``group`` in ``network`` one storage for each tensor, holding ``values``."""
    modules = [network.get_submodule(site.module) for site in group.sites]
    for spec in group.tensors:
        if spec.common:
            continue
        first = tensor_of(modules[0], spec.name)
        value = values[spec.name].to(first).contiguous()  # means of transposed views are not
        base = value if spec.buffer else nn.Parameter(value, requires_grad=False)
        for module in modules:
            _put(module, spec, base)


def assemble(
    base: nn.Module, stage_map: StageMap, choice: Choice, outside: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A network that shares the tensors of ``base``, with the adapter of each site in place.

    ``outside``: parameters to take the place of the base's, by name.
    """
    network = copy_network(base, share_tensors=True)
    replace_parameters(network, outside or {})
    twins: list[tuple[nn.Module, nn.Module]] = []
    for group in stage_map.groups:
        _separate(network, group, twins)
        looped: dict[str, list[nn.Module]] = {}
        for site in group.sites:
            module = network.get_submodule(site.module)
            if site.call is not None:
                original, module = module, copy_network(module, share_tensors=True)
                twins += zip(original.modules(), module.modules())
                looped.setdefault(site.module, []).append(module)
            _install(module, group, choice[group.name, site])
        for name, copies in looped.items():
            tell_calls_apart(network.get_submodule(name), name, copies)
    if twins:
        vars(network)[TWINS] = twins
    return network


def replace_parameters(network: nn.Module, others: Mapping[str, Tensor]) -> None:
    """Put others in the place of parameters, wherever the network holds these."""
    old = {id(network.get_parameter(name)): value for name, value in others.items()}
    for module in network.modules() if old else ():
        for name, tensor in list(module._parameters.items()):
            if id(tensor) in old:
                setattr(module, name, old[id(tensor)])


def _install(module: nn.Module, group: Group, adapter: StageAdapter) -> None:
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    for spec in group.tensors:
        if spec.name in terms:
            places = {owner_of(module, alias): alias for alias in spec.aliases}  # a module may have two names
            for alias in places.values():
                path, _, attribute = alias.rpartition(".")
                add_term(module.get_submodule(path), attribute, terms[spec.name])
        elif spec.name in private:
            _put(module, spec, private[spec.name])


def _separate(network: nn.Module, group: Group, twins: list[tuple[nn.Module, nn.Module]]) -> None:
    """Give each site modules of its own where several sites hold the same module object.

    ``twins``: takes each such module together with its copy.
    """
    owned: dict[int, Site | None] = _shared_with_the_outside(network, group)
    for site in group.sites:
        if site.call is not None:
            continue
        memo: dict[int, object] = {}
        parent, _, attribute = site.module.rpartition(".")
        pending = [(network.get_submodule(parent), attribute)]
        seen: set[int] = set()
        while pending:
            holder, name = pending.pop()
            child = holder._modules[name]
            if child is None:
                continue
            if owned.setdefault(id(child), site) is not site:
                original, child = child, copy_network(child, share_tensors=True, memo=memo)
                holder._modules[name] = child
                twins += zip(original.modules(), child.modules())
                owned[id(child)] = site
            if id(child) not in seen:
                seen.add(id(child))
                pending += [(child, grandchild) for grandchild in child._modules]


def _shared_with_the_outside(network: nn.Module, group: Group) -> dict[int, None]:
    """Modules that several sites hold and that the network uses elsewhere too, where they stay the base's."""
    sites = {id(network.get_submodule(site.module)) for site in group.sites if site.call is None}
    holders: dict[int, int] = {}
    for site in dict.fromkeys(site.module for site in group.sites if site.call is None):
        for module in network.get_submodule(site).modules():
            holders[id(module)] = holders.get(id(module), 0) + 1
    outside: set[int] = set()
    pending = [network]
    while pending:
        module = pending.pop()
        if id(module) not in outside and id(module) not in sites:
            outside.add(id(module))
            pending += [child for child in module.children() if child is not None]
    return {module: None for module in outside if holders.get(module, 0) > 1}


def merge(
    base: nn.Module, stage_map: StageMap, choice: Choice, outside: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A network of the original class with dense tensors of its own; ``outside`` as in :func:`assemble`.

    Raises:
        LoRunError: a module that stands for several stages has been trained apart.
    """
    network = copy_network(base)
    own = {name: nn.Parameter(value.detach().clone(), False) for name, value in (outside or {}).items()}
    replace_parameters(network, own)
    written: dict[tuple[int, str], Tensor] = {}
    for group in stage_map.groups:
        for site in group.sites:
            module, adapter = network.get_submodule(site.module), choice[group.name, site]
            dense = dense_tensors(base.get_submodule(site.module), group, adapter)
            for spec in group.tensors:
                if spec.common:
                    continue
                place = owner_of(module, spec.name)
                if place in written and not torch.equal(written[place], dense[spec.name]):
                    raise LoRunError(
                        f"expected equal stages in {site}, found different ones since its adapters were trained: "
                        f"{stage_map.network} has one module for them all, so keep the LoRunModel and save it with "
                        "save_pretrained"
                    )
                written[place] = dense[spec.name]
                value = dense[spec.name].clone()
                _put(module, spec, value if spec.buffer else nn.Parameter(value, requires_grad=False))
    return network


def dense_tensors(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> dict[str, Tensor]:
    """What a stage's tensors amount to, from the base ``denoiser`` and the stage's adapter."""
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    with torch.no_grad():
        return {
            spec.name: private[spec.name].detach()
            if spec.name in private
            else terms[spec.name](tensor_of(denoiser, spec.name)).detach()
            for spec in group.tensors
            if not spec.common
        }


def distinct_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once, under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor, _ in tensors_of(network):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def held_tensors(base: nn.Module, stage_map: StageMap) -> dict[str, Tensor]:
    """Those that a base holds: all but the zeros that stand in for a base where a tensor has none."""
    zeros = {
        id(tensor)
        for group in stage_map.groups
        for spec in group.tensors
        if spec.alone
        for tensor in stage_parameters(base, group, spec)
    }
    return {name: tensor for name, tensor in distinct_tensors(base).items() if id(tensor) not in zeros}


def outside_parameters(base: nn.Module, stage_map: StageMap) -> dict[str, nn.Parameter]:
    """Those that are no stage's own: step sizes kept beside the stages, condition networks, heads and tails."""
    inside = {
        id(tensor)
        for group in stage_map.groups
        for spec in group.tensors
        if not spec.common
        for tensor in stage_parameters(base, group, spec)
    }
    return {
        name: tensor
        for name, tensor in distinct_tensors(base).items()
        if isinstance(tensor, nn.Parameter) and id(tensor) not in inside
    }


def stage_values(dun: nn.Module, group: Group, spec: TensorSpec) -> list[Tensor]:
    """The tensor of each site, in the order of the stages."""
    return [tensor.detach() for tensor in stage_parameters(dun, group, spec)]


def stage_parameters(network: nn.Module, group: Group, spec: TensorSpec) -> list[nn.Parameter]:
    """The parameter itself at each site, in the order of the stages."""
    return [tensor_of(network.get_submodule(site.module), spec.name) for site in group.sites]


def owner_of(denoiser: nn.Module, name: str) -> tuple[int, str]:
    """Where a tensor is, so that one reached in two ways is known as one: (its module's id, attribute)."""
    path, _, attribute = name.rpartition(".")
    return id(denoiser.get_submodule(path)), attribute


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The tensor of that name, relative to ``module``."""
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def _put(module: nn.Module, spec: TensorSpec, value: Tensor) -> None:
    for alias in spec.aliases:
        path, _, attribute = alias.rpartition(".")
        setattr(module.get_submodule(path), attribute, value)
