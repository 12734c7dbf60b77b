"""The tensors of adapter sets, for files that take them as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..disk.folder import write_file
from ..errors import LoRunError
from ..model.lorun_model import LoRunModel


def tensors_of_sets(lorun: LoRunModel) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each set, by their names in the network when that set is active.

    All sets have the same names. What one set replaces outside the stages, the others have as the base has it.

    Raises:
        LoRunError: two sets have tensors of other names or shapes, so that no program runs both.

    >>> import lorun_adapt
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
    >>> [name for name in tensors_of_sets(lorun)["default"] if "stages.0" in name][:2]
    ['stages.0.step', 'stages.0.conv1.bias']
    """
    converted, before = lorun.converted(), lorun.active_adapters
    names = list(converted.sets)
    inputs: set[str] = set()
    states: dict[str, dict[str, Tensor]] = {}
    try:
        for name in names:
            lorun.set_adapter(name)
            held = converted.sets[name]
            adapters = [adapter for groups in held.adapters.values() for adapter in groups.values()]
            own = {id(tensor) for adapter in adapters for tensor in adapter.state_dict(keep_vars=True).values()}
            own |= {id(tensor) for tensor in held.outside.values()}
            states[name] = lorun.network.state_dict(keep_vars=True)
            inputs |= {key for key, tensor in states[name].items() if id(tensor) in own}
    finally:
        lorun.set_adapter(before)
    found = {name: {key: state[key] for key in state if key in inputs} for name, state in states.items()}
    for name in names[1:]:
        for key in found[names[0]].keys() | found[name].keys():
            shapes = [tuple(found[which][key].shape) if key in found[which] else None for which in (names[0], name)]
            if shapes[0] != shapes[1]:
                raise LoRunError(
                    f"the sets {names[0]!r} and {name!r} differ in more than their values: {key} is of shape "
                    f"{shapes[0]} in one and {shapes[1]} in the other; export each to a file of its own"
                )
    return found


def save_sets(sets: Mapping[str, Mapping[str, Tensor]], path: Path) -> list[Path]:
    """Write each set to a safetensors file beside ``path``, named after both: ``net.onnx`` -> ``net.NAME.safetensors``.

    Returns:
        The files.
    """
    files = []
    for name, tensors in sets.items():
        files.append(path.with_name(f"{path.stem}.{name}.safetensors"))
        _save(tensors, files[-1])
    return files


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_file(path, lambda file: file.write(content))
