"""Find the stages of a deep unfolding network: the modules that are built alike and repeat.

``find_stages`` looks at structure alone (classes, tensor names and shapes); a module that is
called in a loop shows only when the network runs, or when the caller says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import LoRunError
from ..util.modules import tensors_of
from .stage_map import Group, NotTaken, Site, StageMap, TensorSpec, abridged
from .trace import Trace, trace_calls

SHARE = 0.05  # a repeated group below this share of the parameters is listed, not taken


def find_stages(
    dun: nn.Module,
    *,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
) -> StageMap:
    """Find the repeated denoisers of a deep unfolding network.

    Args:
        dun: the network. It is left as it is.
        stages: name the stages instead. A glob pattern (``"fcs.*"``; ``*`` stands for one part of
            a name), several patterns (one group each), a list of module names (one group), or a
            list of such lists (one group each).
        example_inputs: the arguments of one forward. The network runs once on them, so that a
            module called in a loop is seen.
        calls: ``{"p": 8}`` says that module ``p`` is called eight times, one call a stage.

    Without ``stages`` the outermost repetition wins, and each group of modules with at least 5 %
    of the parameters is taken.

    Raises:
        LoRunError: no repeated stage; a pattern or name that matches nothing; stages named by
            hand that differ in shape.
    """
    trace = Trace(dun, {}) if example_inputs is None else trace_calls(dun, example_inputs)
    declared = _declared_calls(dun, calls)
    if stages is not None:
        sets = [_sites(dun, names, trace, declared) for names in _named(dun, stages)]
        rest: list[NotTaken] = []
        for sites in sets:
            check_alike(dun, sites, "stages=")
    else:
        sets, rest = _search(dun, trace, declared)
    if not sets:
        raise LoRunError(
            f"expected a repeated stage in {type(dun).__name__}, found none: name the modules with stages=, or, if "
            "one module is called in a loop, pass example_inputs= or calls="
        )
    groups = _assemble(dun, sets)
    return StageMap(type_before_parametrizations(dun).__name__, groups, (*rest, *_unequal(dun, groups)))


# --- searching -----------------------------------------------------------------------------------


def _search(
    dun: nn.Module, trace: Trace, declared: Mapping[str, int]
) -> tuple[list[list[tuple[str, int | None]]], list[NotTaken]]:
    buckets: dict[object, list[str]] = {}
    for path, module in dun.named_modules(remove_duplicate=False):
        if path and any(True for _ in module.parameters()) and not _is_layer(module):
            buckets.setdefault(signature(module), []).append(path)
    total = _numel(dun, [""])
    candidates = []
    for paths in buckets.values():
        sites = _sites(dun, paths, trace, declared)
        if len(sites) > 1:
            candidates.append((sites, _numel(dun, [path for path, _ in sites])))
    large = [item for item in candidates if item[1] >= SHARE * total]
    tops = [item for item in large if not any(_inside(item[0], other[0]) for other in large)]
    rest = [
        NotTaken(_names(sites), size, f"below {SHARE:.0%} of the parameters")
        for sites, size in candidates
        if size < SHARE * total and not any(_inside(sites, other[0]) for other in candidates)
    ]
    # Blocks that follow each other in a Sequential see no measurements: layers, rather than stages.
    main = max(tops, key=lambda item: (not _in_sequential(dun, item[0]), item[1]), default=None)
    if main is not None and _in_sequential(dun, main[0]) and _owner(dun, main[0]) and not trace.ran:
        raise LoRunError(
            f"expected stages, found only layers that follow each other in {_owner(dun, main[0])}, such as "
            f"{abridged(_names(main[0]))}: if it is called in a loop, pass example_inputs= or calls=, else name the "
            "stages with stages="
        )
    taken = []
    for sites, size in tops:
        owner, home = _owner(dun, sites), _owner(dun, main[0])
        if owner == home or not owner or home.startswith(owner + "."):
            if main[0] is sites or not _in_sequential(dun, sites):
                taken.append(sites)
                continue
        rest.append(NotTaken(_names(sites), size, f"repeats inside {owner or type(dun).__name__}"))
    return taken, rest


def signature(module: nn.Module) -> tuple[object, ...]:
    """What two modules must have in common to be built alike: classes, tensor names, shapes, types."""
    classes = tuple((name, type_before_parametrizations(child)) for name, child in module.named_modules())
    tensors = tuple((name, tuple(t.shape), t.dtype, buffer) for name, t, buffer in tensors_of(module))
    return classes, tensors


def _sites(
    dun: nn.Module, paths: Sequence[str], trace: Trace, declared: Mapping[str, int]
) -> list[tuple[str, int | None]]:
    """Turn the names of equal modules into stages: one a module, a parent or a call."""
    by_object: dict[int, list[str]] = {}
    for path in paths:
        by_object.setdefault(id(dun.get_submodule(path)), []).append(path)
    objects = list(by_object.values())
    counts = [max([declared.get(name, 0) for name in names] + [trace.count(names[0])]) for names in objects]
    if any(name in declared for name in paths) or (len(set(counts)) > 1 and max(counts) > 1):
        looped = True
    else:
        looped = len(objects) == 1 and counts[0] > 1 and counts[0] != len(objects[0])
    if looped:
        sites: list[tuple[str, int | None]] = []
        for names, count in zip(objects, counts):
            sites += [(names[0], call) for call in range(count)] if count > 1 else [(names[0], None)]
        return trace.in_order(sites)
    if len(objects) == 1 or len({len(names) for names in objects}) > 1:
        return [(path, None) for path in paths]  # one object under several parents
    return trace.in_order([(names[0], None) for names in objects])  # other names are aliases


def _declared_calls(dun: nn.Module, calls: Mapping[str, int] | None) -> dict[str, int]:
    for name, count in (calls or {}).items():
        _module(dun, name, "calls=")
        if not isinstance(count, int) or count < 2:
            raise LoRunError(f"expected two calls or more of {name!r} in calls=, found {count!r}: count its calls")
    return dict(calls or {})


def _is_layer(module: nn.Module) -> bool:
    """A single layer of torch (a convolution, a norm, a list of parameters) is no denoiser."""
    return type_before_parametrizations(module).__module__.startswith("torch.nn.modules") and not any(
        True for child in module.children() for _ in child.parameters()
    )


def _numel(dun: nn.Module, paths: Iterable[str]) -> int:
    distinct = {id(p): p.numel() for path in paths for p in dun.get_submodule(path).parameters()}
    return sum(distinct.values())


def _inside(sites: Sequence[tuple[str, int | None]], others: Sequence[tuple[str, int | None]]) -> bool:
    outer = {path for path, _ in others}
    return any(path[:end] in outer for path, _ in sites for end in range(len(path)) if path[end] == ".")


def _in_sequential(dun: nn.Module, sites: Sequence[tuple[str, int | None]]) -> bool:
    return any(
        call is None and isinstance(dun.get_submodule(path.rpartition(".")[0]), nn.Sequential) for path, call in sites
    )


def _owner(dun: nn.Module, sites: Sequence[tuple[str, int | None]]) -> str:
    """The innermost module around all sites that is more than a list."""
    parents = [path.split(".")[:-1] for path, _ in sites]
    common = []
    for parts in zip(*parents):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and isinstance(dun.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict)):
        common.pop()
    return ".".join(common)


# --- naming by hand ------------------------------------------------------------------------------


def _named(dun: nn.Module, stages: str | Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    if isinstance(stages, str):
        return [_match(dun, stages)]
    if not all(isinstance(item, str) for item in stages):
        return [[path for name in item for path in _match(dun, name)] for item in stages]
    patterns = [item for item in stages if _is_pattern(item)]
    names = [path for item in stages if not _is_pattern(item) for path in _match(dun, item)]
    return [_match(dun, pattern) for pattern in patterns] + ([names] if names else [])


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _match(dun: nn.Module, pattern: str) -> list[str]:
    if not _is_pattern(pattern):
        _module(dun, pattern, "stages=")
        return [pattern]
    expression = re.sub(r"\\([\[\]\-])", r"\1", re.escape(pattern)).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
    found = [path for path, _ in dun.named_modules(remove_duplicate=False) if path and re.fullmatch(expression, path)]
    if not found:
        raise LoRunError(
            f"expected modules that match {pattern!r} in {type(dun).__name__}, found none: {_listing(dun)}"
        )
    return found


def _module(dun: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return dun.get_submodule(name)
    except AttributeError:
        raise LoRunError(
            f"expected a module of {type(dun).__name__} in {where}, found {name!r}: {_listing(dun)}"
        ) from None


def _listing(dun: nn.Module) -> str:
    return "its modules are " + abridged(tuple(name for name, _ in dun.named_children()))


def check_alike(dun: nn.Module, sites: Sequence[tuple[str, int | None]], where: str) -> None:
    """Refuse (module, call) pairs, named in ``where``, that can't be the stages of one group.

    Raises:
        LoRunError: fewer than two, one twice or inside another, or tensors of another shape or dtype.
        AttributeError: no such module.
    """
    names = [path for path, _ in sites]
    if len(sites) < 2:
        raise LoRunError(
            f"expected two stages or more in {where}, found {', '.join(names) or 'none'}: name them all, or say with "
            "calls= how often the module is called"
        )
    if _inside(sites, sites) or len(set(sites)) < len(sites):
        raise LoRunError(
            f"expected separate stages in {where}, found one twice or inside another among {abridged(names)}: "
            "name the outer or the inner ones"
        )
    first = {name: (tuple(t.shape), t.dtype) for name, t, _ in tensors_of(dun.get_submodule(names[0]))}
    if not first:
        raise LoRunError(f"expected stages with parameters in {where}, found none in {names[0]}: name other modules")
    for other in names[1:]:
        here = {name: (tuple(t.shape), t.dtype) for name, t, _ in tensors_of(dun.get_submodule(other))}
        for name in (*first, *here):
            if first.get(name) != here.get(name):
                raise LoRunError(
                    f"expected stages of equal shape in {where}, found tensor {name!r} with {_shape(first.get(name))} "
                    f"in {names[0]} and {_shape(here.get(name))} in {other}: name only stages that are built alike"
                )


def _shape(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if found is None else f"{found[0]} of {found[1]}"


# --- putting together ----------------------------------------------------------------------------


def _assemble(dun: nn.Module, sets: Sequence[Sequence[tuple[str, int | None]]]) -> tuple[Group, ...]:
    order = {path: i for i, (path, _) in enumerate(dun.named_modules(remove_duplicate=False))}
    groups: list[Group] = []
    for sites, indices in zip(sets, _stage_indices(sets)):
        name = "denoiser" if len(sets) == 1 else _group_name(sites, [group.name for group in groups])
        members = tuple(Site(index, path, call) for index, (path, call) in zip(indices, sites))
        groups.append(Group(name, members, tensor_specs(dun, members)))
    groups.sort(key=lambda group: order[group.sites[0].module])
    return tuple(groups)


def _stage_indices(sets: Sequence[Sequence[tuple[str, int | None]]]) -> list[list[int]]:
    """Stages by position, or by the numbers in the names where groups do not have the same."""
    numbers = [[_number(path) for path, call in sites if call is None] for sites in sets]
    if all(None not in n and len(set(n)) == len(n) == len(sites) for n, sites in zip(numbers, sets)):
        if len({frozenset(n) for n in numbers}) > 1:
            order = sorted({number for n in numbers for number in n})  # type: ignore[type-var]
            return [[order.index(number) for number in n] for n in numbers]
    return [list(range(len(sites))) for sites in sets]


def _number(path: str) -> int | None:
    found = re.findall(r"\d+", path)
    return int(found[0]) if found else None


def _group_name(sites: Sequence[tuple[str, int | None]], used: Sequence[str]) -> str:
    parts = re.split(r"[^A-Za-z-]+", sites[0][0])  # the name less its numbers
    name = "_".join(part for part in parts if part) or "denoiser"
    return name if name not in used and not hasattr(nn.ModuleDict(), name) else f"{name}_{len(used)}"


def tensor_specs(dun: nn.Module, sites: Sequence[Site], common: set[str] | None = None) -> tuple[TensorSpec, ...]:
    """The tensors of a group's denoiser, from the modules at its sites.

    Which tensors are ``common`` is seen from their values; for other values of the same network
    it can be given.
    """
    modules = [dun.get_submodule(site.module) for site in sites]
    tables = [{name: tensor for name, tensor, _ in tensors_of(module)} for module in modules]
    names: dict[int, list[str]] = {}
    buffers = {}
    for name, tensor, buffer in tensors_of(modules[0]):
        names.setdefault(id(tensor), []).append(name)
        buffers[name] = buffer
    specs = []
    some_train = any(parameter.requires_grad for parameter in dun.parameters())
    for aliases in names.values():
        name = aliases[0]
        tensor, path = tables[0][name], name.rpartition(".")[0]
        owners = [module.get_submodule(path) for module in modules]
        same = all(other[name] is tensor for other in tables)
        frozen = not buffers[name] and some_train and not tensor.requires_grad
        if common is not None:
            one_for_all = name in common
        elif buffers[name] or frozen:
            # Running statistics drift apart in training; other buffers are constants where they agree.
            moving = isinstance(owners[0], nn.modules.batchnorm._NormBase)
            one_for_all = not moving and (same or all(_equal(other[name], tensor) for other in tables))
        else:
            one_for_all = same and len({id(owner) for owner in owners}) > 1
        owner = type_before_parametrizations(owners[0])
        shape = tuple(tensor.shape)
        specs.append(TensorSpec(name, shape, tensor.dtype, buffers[name], tuple(aliases), owner, frozen, one_for_all))
    return tuple(specs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _unequal(dun: nn.Module, groups: Sequence[Group]) -> list[NotTaken]:
    """Modules named or built like the stages found, but of another shape."""
    taken = [(site.module, None) for group in groups for site in group.sites]
    patterns = {re.sub(r"\d+", "#", path) for path, _ in taken if re.search(r"\d", path)}
    classes = {type_before_parametrizations(dun.get_submodule(path)) for path, _ in taken}
    classes -= {nn.Sequential, nn.ModuleList, nn.ModuleDict}
    objects = {id(dun.get_submodule(path)) for path, _ in taken}
    found: list[NotTaken] = []
    for path, module in dun.named_modules():
        alike = re.sub(r"\d+", "#", path) in patterns or type_before_parametrizations(module) in classes
        nested = _inside([(path, None)], taken) or any(path.startswith(item.modules[0] + ".") for item in found)
        if path and alike and id(module) not in objects and not nested and any(True for _ in module.parameters()):
            found.append(NotTaken((path,), _numel(dun, [path]), "like a stage, but of another shape"))
    return found


def _names(sites: Sequence[tuple[str, int | None]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for path, _ in sites))
