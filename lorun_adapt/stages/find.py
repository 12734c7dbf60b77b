"""Find the stages of a deep unfolding network: the modules that are built alike and repeat.

``find_stages`` looks at structure only: classes, tensor names and shapes. That a module is called in a loop shows only
when the network runs, or when the caller says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import LoRunError
from ..util.modules import tensors_of
from .checks import check_alike
from .locations import Location, any_inside, paths_of
from .naming import declared_calls, named_stages
from .specs import tensor_specs
from .stage_map import Group, NotTaken, Site, StageMap, abridged
from .trace import CallTrace, trace_calls

MIN_SHARE = 0.05  # of the parameters: a smaller repeated group is listed, but not taken


def find_stages(
    dun: nn.Module,
    *,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
) -> StageMap:
    """Find the repeated denoisers of a deep unfolding network.

    Without ``stages``, the outermost repetition wins, and each group of modules with at least 5 % of the parameters is
    taken.

    Args:
        dun: the network; it is left unchanged.
        stages: names the stages instead: a glob pattern (``"fcs.*"``; ``*`` stands for one part of a name), several
            patterns (one group each), a list of module names (one group), or a list of such lists (one group each).
        example_inputs: the arguments of one forward. The network runs once on them, so that a module called in a
            loop is seen.
        calls: ``{"p": 8}`` says that module ``p`` is called eight times, once in each stage.

    Returns:
        The stages, numbered from 0 in the order of the network, in one group for each repeated denoiser, with the
        names, shapes and dtypes of their tensors.

    Raises:
        LoRunError: there is no repeated stage; a pattern or name matches no module; the stages named by hand differ
            in shape; the network fails on ``example_inputs``.

    >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
    >>> stage_map = find_stages(nn.ModuleDict({"blocks": blocks}))
    >>> len(stage_map), [str(site) for site in stage_map.groups[0].sites]
    (3, ['blocks.0', 'blocks.1', 'blocks.2'])
    >>> len(find_stages(nn.ModuleDict({"p": nn.Linear(4, 4)}), stages="p", calls={"p": 8}))
    8
    """
    trace = CallTrace(dun, {}) if example_inputs is None else trace_calls(dun, example_inputs)
    declared = declared_calls(dun, calls)
    if stages is not None:
        stages_of_groups = [_locations(dun, paths, trace, declared) for paths in named_stages(dun, stages)]
        not_taken: list[NotTaken] = []
        for locations in stages_of_groups:
            check_alike(dun, locations, "stages=")
    else:
        stages_of_groups, not_taken = _repeated(dun, trace, declared)
    if not stages_of_groups:
        raise LoRunError(
            f"no repeated stage in {type(dun).__name__}: name the modules with stages=, or, if one module is called in "
            "a loop, pass example_inputs= or calls="
        )
    groups = _groups(dun, stages_of_groups)
    return StageMap(type_before_parametrizations(dun).__name__, groups, (*not_taken, *_unequal(dun, groups)))


# --- searching -----------------------------------------------------------------------------------


def _repeated(
    dun: nn.Module, trace: CallTrace, declared: Mapping[str, int]
) -> tuple[list[list[Location]], list[NotTaken]]:
    """The stages of each group that is taken, and the repeated modules that are not."""
    alike: dict[object, list[str]] = {}
    for path, module in dun.named_modules(remove_duplicate=False):
        if path and any(True for _ in module.parameters()) and not _is_layer(module):
            alike.setdefault(signature(module), []).append(path)
    total = _num_parameters(dun, [""])
    candidates: list[tuple[list[Location], int]] = []
    for paths in alike.values():
        locations = _locations(dun, paths, trace, declared)
        if len(locations) > 1:
            candidates.append((locations, _num_parameters(dun, [path for path, _ in locations])))
    large = [item for item in candidates if item[1] >= MIN_SHARE * total]
    outermost = [item for item in large if not any(any_inside(item[0], other[0]) for other in large)]
    not_taken = [
        NotTaken(paths_of(locations), size, f"below {MIN_SHARE:.0%} of the parameters")
        for locations, size in candidates
        if size < MIN_SHARE * total and not any(any_inside(locations, other[0]) for other in candidates)
    ]
    if not outermost:
        return [], not_taken
    # Blocks that follow each other in a Sequential see no measurements: they are layers rather than stages.
    main, _ = max(outermost, key=lambda item: (not _in_sequential(dun, item[0]), item[1]))
    main_owner = _owner(dun, main)
    if _in_sequential(dun, main) and main_owner and trace.is_empty:
        raise LoRunError(
            f"{type(dun).__name__} repeats only layers that follow each other in {main_owner}, such as "
            f"{abridged(paths_of(main))}: if {main_owner} is called in a loop, pass example_inputs= or calls=, "
            "otherwise name the stages with stages="
        )
    taken = []
    for locations, size in outermost:
        owner = _owner(dun, locations)
        if owner == main_owner or not owner or main_owner.startswith(owner + "."):
            if main is locations or not _in_sequential(dun, locations):
                taken.append(locations)
                continue
        not_taken.append(NotTaken(paths_of(locations), size, f"repeats inside {owner or type(dun).__name__}"))
    return taken, not_taken


def signature(module: nn.Module) -> tuple[object, ...]:
    """Return what two modules have in common where they are built alike: classes, tensor names, shapes and dtypes."""
    classes = tuple((name, type_before_parametrizations(child)) for name, child in module.named_modules())
    tensors = tuple((name, tuple(t.shape), t.dtype, buffer) for name, t, buffer in tensors_of(module))
    return classes, tensors


def _locations(dun: nn.Module, paths: Sequence[str], trace: CallTrace, declared: Mapping[str, int]) -> list[Location]:
    """The stages that modules built alike make: one for each module, for each of its parents, or for each call."""
    by_object: dict[int, list[str]] = {}
    for path in paths:
        by_object.setdefault(id(dun.get_submodule(path)), []).append(path)
    objects = list(by_object.values())
    counts = [max([declared.get(name, 0) for name in names] + [trace.num_calls(names[0])]) for names in objects]
    if any(name in declared for name in paths) or (len(set(counts)) > 1 and max(counts) > 1):
        looped = True
    else:
        looped = len(objects) == 1 and counts[0] > 1 and counts[0] != len(objects[0])
    if looped:
        locations: list[Location] = []
        for names, count in zip(objects, counts):
            locations += [(names[0], call) for call in range(count)] if count > 1 else [(names[0], None)]
        return trace.in_order(locations)
    if len(objects) == 1 or len({len(names) for names in objects}) > 1:
        return [(path, None) for path in paths]  # one object under several parents
    return trace.in_order([(names[0], None) for names in objects])  # other names are aliases


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a single layer of torch, such as a convolution, a norm or a list of parameters: no denoiser."""
    return type_before_parametrizations(module).__module__.startswith("torch.nn.modules") and not any(
        True for child in module.children() for _ in child.parameters()
    )


def _num_parameters(dun: nn.Module, paths: Iterable[str]) -> int:
    distinct = {id(p): p.numel() for path in paths for p in dun.get_submodule(path).parameters()}
    return sum(distinct.values())


def _in_sequential(dun: nn.Module, locations: Sequence[Location]) -> bool:
    return any(
        call is None and isinstance(dun.get_submodule(path.rpartition(".")[0]), nn.Sequential)
        for path, call in locations
    )


def _owner(dun: nn.Module, locations: Sequence[Location]) -> str:
    """The path of the innermost module around all locations that is no list or dict of modules."""
    parents = [path.split(".")[:-1] for path, _ in locations]
    common = []
    for parts in zip(*parents):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and isinstance(dun.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict)):
        common.pop()
    return ".".join(common)


# --- putting together ----------------------------------------------------------------------------


def _groups(dun: nn.Module, stages_of_groups: Sequence[Sequence[Location]]) -> tuple[Group, ...]:
    order = {path: i for i, (path, _) in enumerate(dun.named_modules(remove_duplicate=False))}
    groups: list[Group] = []
    for locations, indices in zip(stages_of_groups, _stage_indices(stages_of_groups)):
        name = "denoiser"
        if len(stages_of_groups) > 1:
            name = _group_name(locations, [group.name for group in groups])
        sites = tuple(Site(index, path, call) for index, (path, call) in zip(indices, locations))
        groups.append(Group(name, sites, tensor_specs(dun, sites)))
    groups.sort(key=lambda group: order[group.sites[0].module])
    return tuple(groups)


def _stage_indices(stages_of_groups: Sequence[Sequence[Location]]) -> list[list[int]]:
    """Number stages by position, or by the numbers in their names where the groups have different ones."""
    numbers: list[list[int]] = []
    for locations in stages_of_groups:
        in_names = [_number(path) for path, call in locations if call is None]
        numbers.append([number for number in in_names if number is not None])
    if all(len(set(n)) == len(n) == len(locations) for n, locations in zip(numbers, stages_of_groups)):
        if len({frozenset(n) for n in numbers}) > 1:
            order = sorted({number for n in numbers for number in n})
            return [[order.index(number) for number in n] for n in numbers]
    return [list(range(len(locations))) for locations in stages_of_groups]


def _number(path: str) -> int | None:
    numbers = re.findall(r"\d+", path)
    return int(numbers[0]) if numbers else None


def _group_name(locations: Sequence[Location], used: Sequence[str]) -> str:
    parts = re.split(r"[^A-Za-z-]+", locations[0][0])  # the name without its numbers
    name = "_".join(part for part in parts if part) or "denoiser"
    return name if name not in used and not hasattr(nn.ModuleDict(), name) else f"{name}_{len(used)}"


def _unequal(dun: nn.Module, groups: Sequence[Group]) -> list[NotTaken]:
    """Modules that are named or built like the stages, but have another shape."""
    taken: list[Location] = [(site.module, None) for group in groups for site in group.sites]
    patterns = {re.sub(r"\d+", "#", path) for path, _ in taken if re.search(r"\d", path)}
    classes = {type_before_parametrizations(dun.get_submodule(path)) for path, _ in taken}
    classes -= {nn.Sequential, nn.ModuleList, nn.ModuleDict}
    objects = {id(dun.get_submodule(path)) for path, _ in taken}
    unequal: list[NotTaken] = []
    for path, module in dun.named_modules():
        alike = re.sub(r"\d+", "#", path) in patterns or type_before_parametrizations(module) in classes
        nested = any_inside([(path, None)], taken) or any(path.startswith(item.modules[0] + ".") for item in unequal)
        if path and alike and id(module) not in objects and not nested and any(True for _ in module.parameters()):
            unequal.append(NotTaken((path,), _num_parameters(dun, [path]), "like a stage, but of another shape"))
    return unequal
