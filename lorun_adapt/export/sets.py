"""Adapter sets for files that take their tensors as inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor, nn

from ..disk.folder import write_file
from ..errors import LoRunError
from ..model.lorun_model import LoRunModel
from ..network.adapter import terms_of
from ..util.nested import tensors_in


class SetInputs(NamedTuple):
    """A set, as a file takes it.

    Attributes:
        tensors: by their names in the network when the set is active.
        outputs: the tensors that the network then returns.
    """

    tensors: dict[str, Tensor]
    outputs: list[Tensor]


def inputs_of_sets(lorun: LoRunModel, run: Callable[[nn.Module], Any]) -> dict[str, SetInputs]:
    """Return the tensors in which the network differs from set to set, and its outputs with each set.

    The tensors have the same names in all sets. If only some sets replace a parameter outside the stages, the others
    have the base's value of it.

    Args:
        lorun: the network; it does not change.
        run: runs a network of this structure on the same arguments each time.

    Raises:
        LoRunError: two sets have tensors of other names, shapes or scalings, so that no program runs both; a set lacks
            stages.

    >>> import lorun_adapt, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
    >>> inputs = inputs_of_sets(lorun, lambda network: network(torch.rand(1, 1, 8, 8)))
    >>> list(inputs["default"].tensors)[:2]
    ['stages.0.step', 'stages.0.conv1.bias']
    """
    lorun = copy.deepcopy(lorun)
    sets = lorun.converted().sets
    names = list(sets)
    inputs: set[str] = set()
    states: dict[str, dict[str, Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for name, held in sets.items():
        lorun.set_adapter(name)
        adapters = [adapter for groups in held.adapters.values() for adapter in groups.values()]
        own = {id(tensor) for adapter in adapters for tensor in adapter.state_dict(keep_vars=True).values()}
        own |= {id(tensor) for tensor in held.outside.values()}
        states[name] = lorun.network.state_dict(keep_vars=True)
        inputs |= {key for key, tensor in states[name].items() if id(tensor) in own}
        outputs[name] = [tensor.detach().cpu() for tensor in tensors_in(run(lorun.network))]
    first = states[names[0]]
    for state in states.values():  # a noise schedule may write others into the network
        inputs |= {key for key, tensor in state.items() if tensor is not first.get(key)}
    found = {name: {key: state[key] for key in state if key in inputs} for name, state in states.items()}
    for name in names[1:]:
        _check_alike(names[0], found[names[0]], name, found[name])
        for stage, groups in sets[name].adapters.items():
            for group, adapter in groups.items():
                other = terms_of(sets[names[0]].adapters[stage][group])
                for key, term in terms_of(adapter).items():
                    if key in other and other[key].scaling != term.scaling:
                        raise LoRunError(
                            f"the sets {names[0]!r} and {name!r} scale {key} of stage {stage} by "
                            f"{other[key].scaling:g} and {term.scaling:g}: export each to a file of its own"
                        )
    return {name: SetInputs(found[name], outputs[name]) for name in names}


def _check_alike(first: str, tensors: Mapping[str, Tensor], name: str, others: Mapping[str, Tensor]) -> None:
    for key in dict.fromkeys([*tensors, *others]):
        shapes = [f"of shape {tuple(found[key].shape)}" if key in found else "missing" for found in (tensors, others)]
        if shapes[0] != shapes[1]:
            raise LoRunError(
                f"the sets {first!r} and {name!r} differ in more than their values: {key} is {shapes[0]} in one and "
                f"{shapes[1]} in the other; export each to a file of its own"
            )


def save_sets(sets: Mapping[str, SetInputs], names: Collection[str], path: Path) -> list[Path]:
    """Write each set to a safetensors file beside ``path``, named after both: ``net.onnx`` -> ``net.NAME.safetensors``.

    Args:
        sets: the sets.
        names: those of their tensors that the file at ``path`` takes.
        path: the file.

    Returns:
        The files.
    """
    files = []
    for name, (tensors, _) in sets.items():
        files.append(path.with_name(f"{path.stem}.{name}.safetensors"))
        _save({key: tensor for key, tensor in tensors.items() if key in names}, files[-1])
    return files


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_file(path, lambda file: file.write(content))
