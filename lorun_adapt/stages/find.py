"""Find the stages of a deep unfolding network: the modules that are built alike and repeat.

``find_stages`` looks at structure only: classes, tensor names and shapes. That a module is called in a loop shows only
when the network runs, or when the caller says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import LoRunError
from ..util.modules import positional_arguments, tensors_of, wrapper_path
from .checks import check_alike, check_plain
from .hints import hint_on_layers
from .left_out import left_out
from .locations import Location, any_inside, paths_of
from .naming import declared_calls, named_stages
from .numbering import group_name, stage_indices
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
    check_plain(dun)
    if isinstance(example_inputs, Tensor):
        raise LoRunError("expected a tuple of arguments as example_inputs, found a tensor: write (y,) for one")
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
        advice = "name the modules with stages=, or, if one module is called in a loop, pass example_inputs= or calls="
        if not trace.is_empty:
            advice = (
                "it does not seem to unfold an algorithm; if it does, name the stages with stages=, a list of modules "
                "for each kind of module"
            )
        hints = [advice, *filter(None, [hint_on_layers(dun)])]
        raise LoRunError(f"no repeated stage in {type(dun).__name__}: {'; '.join(hints)}")
    for path, call in (location for locations in stages_of_groups for location in locations):
        if call is not None and not trace.is_empty and not trace.num_calls(path):
            raise LoRunError(
                f"{path} of {type(dun).__name__} is not called in a forward, so its calls cannot be told apart: the "
                "network runs another of its methods, or the layers in it; have it call the module"
            )
    groups = _groups(dun, stages_of_groups)
    if stages is None and trace.is_empty and not declared:
        _warn_of_unseen_loops(dun, groups)
    return StageMap(type_before_parametrizations(dun).__name__, groups, left_out(dun, groups, not_taken))


# --- searching -----------------------------------------------------------------------------------


def _repeated(
    dun: nn.Module, trace: CallTrace, declared: Mapping[str, int]
) -> tuple[list[list[Location]], list[NotTaken]]:
    """The stages of each group that is taken, and the repeated modules that are not."""
    total = _num_parameters(dun, [""])
    candidates, layers = _candidates(dun, trace, declared)
    large = [item for item in candidates if _share(dun, item, total) >= MIN_SHARE]
    reasons = [(item, f"below {MIN_SHARE:.0%} of the parameters") for item in candidates if item not in large]
    reasons += [(item, "layers: no measurements come in between, or they are a U-Net's scales") for item in layers]
    if not large:
        if any(_share(dun, item, total) >= MIN_SHARE for item in layers):
            raise LoRunError(
                f"{type(dun).__name__} does not seem to unfold an algorithm, as what repeats in it are layers, such as "
                f"{abridged(paths_of(layers[0]))}: no measurements come in between them, or they are the scales of a "
                "U-Net; if it does, name the stages with stages="
            )
        return [], []
    main = max(large, key=lambda item: (not _in_sequential(dun, item, trace), _share(dun, item, total)))
    main_owner = _owner(dun, main, trace)
    if main_owner and trace.is_empty and not any(path in declared for path, _ in main):
        raise LoRunError(
            f"{type(dun).__name__} repeats modules inside {main_owner}, such as {abridged(paths_of(main))}: if "
            f"{main_owner} is called in a loop, pass example_inputs= or calls=, otherwise name the stages with stages="
        )
    taken = []
    for locations in large:
        owner = _owner(dun, locations, trace)
        beside = owner == main_owner or not owner or main_owner.startswith(owner + ".")
        if locations is main or (beside and not _in_sequential(dun, locations, trace)):
            taken.append(locations)
        else:
            reasons.append((locations, f"repeats inside {owner or type(dun).__name__}"))
    paths = [(paths_of(locations), reason) for locations, reason in reasons]
    return taken, [NotTaken(names, _num_parameters(dun, names), reason) for names, reason in paths]


def _candidates(
    dun: nn.Module, trace: CallTrace, declared: Mapping[str, int]
) -> tuple[list[list[Location]], list[list[Location]]]:
    """What repeats outside everything else that repeats: what may be stages, and what is only layers."""
    alike = _alike(dun, trace)
    total = _num_parameters(dun, [""])
    everywhere = [_locations(dun, paths, trace, declared) for paths in alike]
    large = [item for item in everywhere if len(item) > 1 and _share(dun, item, total) >= MIN_SHARE]
    outer = [dun.get_submodule(path) for item in large for path in paths_of(item)]
    # What a repeated module holds repeats with it, and is not counted again, under whatever name.
    inside = {id(child) for module in outer for child in module.modules() if child is not module}
    outside = [[path for path in paths if id(dun.get_submodule(path)) not in inside] for paths in alike]
    found = [_locations(dun, paths, trace, declared) for paths in outside if paths]
    candidates = [locations for locations in found if len(locations) > 1]
    small = [item for item in candidates if _share(dun, item, total) < MIN_SHARE]
    candidates = [
        item for item in candidates if item not in small or not any(any_inside(item, other) for other in candidates)
    ]
    scales = any(trace.shrink(item) for item in candidates)
    gaps = [trace.gap_of_coarser(item) for item in candidates]
    layers = [
        item
        for item, gap in zip(candidates, gaps)
        if not any(path in declared for path, _ in item)
        and (
            trace.lack_measurements(item)
            or (scales and trace.changes_size(item))
            or gap is not None
            or any(trace.are_within(item, other) for other in gaps if other is not None)
        )
    ]
    return [item for item in candidates if item not in layers], layers


def _alike(dun: nn.Module, trace: CallTrace) -> list[list[str]]:
    """The paths of all modules that may be stages, those built alike together."""
    alike: dict[object, list[str]] = {}
    for path, module in dun.named_modules(remove_duplicate=False):
        if not path or _is_layer(module) or not any(True for _ in module.parameters()):
            continue
        # A list is a stage only in a list of stages; a copy of the list beside it, or a second name, is none.
        if not _is_list(dun, path, trace) or _is_list(dun, path.rpartition(".")[0], trace):
            alike.setdefault(signature(module), []).append(path)
    result = []
    for paths in alike.values():
        modules = [dun.get_submodule(path) for path in paths]
        if any(map(trace.was_called, modules)) or not any(_is_shell(module, trace) for module in modules):
            reached = [path for path in paths if trace.reaches(_list_around(dun, path, trace))]
            result.append(reached or paths)  # a list that does not run, such as an average of the weights, is left
    return result


def _list_around(dun: nn.Module, path: str, trace: CallTrace) -> str:
    """The path of the innermost list that holds the module at ``path``; empty if there is none."""
    while path:
        path = path.rpartition(".")[0]
        if path and _is_list(dun, path, trace):
            return path
    return ""


def _is_shell(module: nn.Module, trace: CallTrace) -> bool:
    """Whether it is not called, but its only child is, as in deepinv's priors: the child is what repeats."""
    children = list(module.children())
    own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    return len(children) == 1 and not own and not trace.was_called(module) and trace.was_called(children[0])


def _share(dun: nn.Module, locations: Sequence[Location], total: int) -> float:
    """The share of the parameters that modules have."""
    return _num_parameters(dun, paths_of(locations)) / total


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


def _in_sequential(dun: nn.Module, locations: Sequence[Location], trace: CallTrace) -> bool:
    """Whether they follow each other in a Sequential, where blocks see no measurements: layers rather than stages."""
    parents = {path.rpartition(".")[0] for path, call in locations if call is None}
    return any(
        isinstance(dun.get_submodule(parent), nn.Sequential) and not _is_list(dun, parent, trace) for parent in parents
    )


def _is_list(dun: nn.Module, path: str, trace: CallTrace) -> bool:
    """Whether a module is a list or dict of modules, or a Sequential that serves as one."""
    module = dun.get_submodule(path)
    if not isinstance(module, nn.Sequential):
        return isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if not trace.is_empty:
        return not trace.num_calls(path)
    return any(sum(positional_arguments(child).values()) > 1 for child in module)


def _owner(dun: nn.Module, locations: Sequence[Location], trace: CallTrace) -> str:
    """The path of the innermost module around all locations that is no list or dict of modules."""
    parents = [path.split(".")[:-1] for path, _ in locations]
    common = []
    for parts in zip(*parents):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and _is_list(dun, ".".join(common), trace):
        common.pop()
    owner = ".".join(common)
    return "" if owner == wrapper_path(dun) else owner


# --- putting together ----------------------------------------------------------------------------


def _groups(dun: nn.Module, stages_of_groups: Sequence[Sequence[Location]]) -> tuple[Group, ...]:
    order = {path: i for i, (path, _) in enumerate(dun.named_modules(remove_duplicate=False))}
    groups: list[Group] = []
    for locations, indices in zip(stages_of_groups, stage_indices(stages_of_groups)):
        name = "denoiser"
        if len(stages_of_groups) > 1:
            name = group_name(locations, [group.name for group in groups])
        sites = tuple(Site(index, path, call) for index, (path, call) in zip(indices, locations))
        groups.append(Group(name, sites, tensor_specs(dun, sites)))
    groups.sort(key=lambda group: order[group.sites[0].module])
    return tuple(groups)


def _warn_of_unseen_loops(dun: nn.Module, groups: Sequence[Group]) -> None:
    """Say that a loop would not be seen, where three or more stages have names of their own: head, body, tail."""
    for group in groups:
        names = [site.module for site in group.sites]
        if len(names) > 2 and not any(re.search(r"\d", name) for name in names):
            warnings.warn(
                f"{type(dun).__name__} has the stages {abridged(names)}: if one of them is called in a loop, pass "
                "example_inputs= or calls=, since a loop shows only when the network runs",
                stacklevel=3,
            )
