"""Reading a trained network's weights from the files in which authors publish them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..disk.kind import check_is_data, is_safetensors
from ..errors import LoRunError

States = dict[str, dict[str, Tensor]]  # by the keys under which they are in the file, joined by dots

DEPTH = 3  # how many keys deep a state_dict may be
AVERAGED = re.compile(r"(^|[._])(ema|avg|average|averaged|swa)([._]|$)")  # in a key: an average of the weights
OPTIMISER = re.compile(r"(^|[._])(optim\w*|\w*exp_avg\w*)(\.|$)")  # in a key: no weights, though named as they are
COUNT = "n_averaged"  # beside the weights, in the state_dict of torch.optim.swa_utils.AveragedModel
SHOWN = 6  # names in a message


class OfNumPy:
    """Stands in for NumPy's numbers and arrays, such as a best PSNR, that are in a file beside its tensors.

    Nobody needs them here, so none of NumPy's own functions runs on what a file holds.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


OF_NUMPY: list[Any] = [
    (OfNumPy, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
]


def read_states(path: Path) -> States:
    """Return every state_dict in a safetensors or torch file, by its key; the key is empty if the file is one itself.

    Raises:
        LoRunError: the file is damaged, is something else, holds objects other than tensors, or no state_dict.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     torch.save({"state_dict": {"step": torch.ones(1)}, "epoch": 3}, Path(here) / "net.pth")
    ...     read_states(Path(here) / "net.pth")
    {'state_dict': {'step': tensor([1.])}}
    """
    check_is_data(path)
    if is_safetensors(path):
        try:
            return {"": load_file(path)}
        except (SafetensorError, OSError) as error:
            raise LoRunError(f"{path} is a damaged safetensors file: {error}; download it again") from error
    content = _load(path)
    states = dict(_states_in(content, ""))
    if not states:
        raise LoRunError(
            f"expected a state_dict in {path}, found {_summary(content)}: define load(path, net) in the task"
        )
    return states


def choose_state(states: States, net: nn.Module, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the state_dict for ``net``, with the names that it has there.

    Args:
        states: what the file holds.
        net: the network.
        path: the file, for messages.
        key: the key of the state_dict to take; by default that which fits ``net``, and of several averaged weights.

    Raises:
        LoRunError: there is nothing under ``key``.

    Warns:
        UserWarning: several would fit.
    """
    if key is not None:
        if key not in states:
            raise LoRunError(
                f"no weights under the key {key!r} in {path}: choose one of {', '.join(map(repr, states)) or 'none'}"
            )
        return with_names_of(net, states[key])
    named = {key: with_names_of(net, state) for key, state in states.items()}
    wanted = net.state_dict().keys()
    fitting = [key for key, state in named.items() if state.keys() == wanted and not OPTIMISER.search(key)]
    if not fitting:
        return max(named.values(), key=lambda state: len(state.keys() & wanted))
    chosen = next((key for key in fitting if AVERAGED.search(key)), fitting[0])
    if len(fitting) > 1:
        kind = "the averaged ones, " if AVERAGED.search(chosen) else ""
        warnings.warn(
            f"{path} holds weights under {', '.join(map(repr, fitting))}: loading {kind}{chosen!r}; choose others with "
            "--weights-key, or weights_key in the task",
            stacklevel=2,
        )
    return named[chosen]


def with_names_of(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the names in ``net``, without or with what wrappers add to them.

    These are the prefixes of DataParallel and torch.compile, and the count of weights in an ``AveragedModel``.

    >>> sorted(with_names_of(nn.DataParallel(nn.Linear(1, 1)), {"_orig_mod.weight": torch.ones(1, 1)}))
    ['module.weight']
    """
    if COUNT in state and COUNT not in net.state_dict():
        state = {name: tensor for name, tensor in state.items() if name != COUNT}
    wanted = {_unwrapped(name): name for name in net.state_dict()}
    found = {_unwrapped(name) for name in state}
    if state.keys() == net.state_dict().keys() or len(wanted) < len(net.state_dict()) or len(found) < len(state):
        return dict(state)
    named = {wanted.get(_unwrapped(name), _unwrapped(name)): tensor for name, tensor in state.items()}
    return _with_tied_names(net, named)


def _with_tied_names(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the other names of tensors that ``net`` ties: safetensors' ``save_model`` writes each under one name only."""
    places: dict[object, list[str]] = {}
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.data_ptr():
            places.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    for names in places.values():
        given = next((state[name] for name in names if name in state), None)
        if given is not None:
            state |= {name: given for name in names if name not in state}
    return state


def mismatch(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say in what way ``state`` is not for ``net``, with the likely cause.

    >>> mismatch(nn.Linear(1, 1), {"net.weight": torch.ones(1, 1), "net.bias": torch.ones(1)})
    "missing bias, weight; unexpected net.bias, net.weight; all names in the file have the prefix 'net.'"
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if isinstance(state.get(name), Tensor) and tuple(state[name].shape) != shape
    ]
    parts = [
        f"{what} {_names(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return "; ".join([*parts, *_cause(set(wanted), set(state))])


def _load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(OF_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, pickle.UnpicklingError among them
        others = _other_objects(path, str(error))
        if others:
            raise LoRunError(
                f"{path} holds more than tensors, which is not loaded, as it could run code: {', '.join(others)}; ask "
                "its authors for the state_dict alone, or a safetensors file"
            ) from error
        whole = "cut off or damaged" if _looks_like_torch(path) else "no file of torch or safetensors"
        raise LoRunError(f"{path} is {whole}: download it again") from error


def _looks_like_torch(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _other_objects(path: Path, message: str) -> list[str]:
    """The classes and functions that a file needs beyond those of tensors."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a file of torch before 1.6, or none at all
        return re.findall(r"GLOBAL (\S+) was not an allowed", message)


def _states_in(content: object, key: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mappings from names to tensors in ``content``, with their keys."""
    if not isinstance(content, Mapping) or key.count(".") >= DEPTH:
        return
    if content and all(_is_entry(name, value) for name, value in content.items()):
        yield key, dict(content)
        return
    for name, value in content.items():
        if isinstance(name, str):
            yield from _states_in(value, f"{key}.{name}".lstrip("."))


def _is_entry(name: object, value: object) -> bool:
    """Whether it can be an entry of a state_dict: a tensor, or what ``get_extra_state`` of a module returned."""
    return isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))


def _summary(content: object) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return "a dict of " + ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(content.items())[:12])


def _unwrapped(name: str) -> str:
    """A name without what DataParallel and torch.compile put in it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _names(names: Iterable[str]) -> str:
    """Names, shortest first, at most six of them."""
    found = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _cause(wanted: set[str], found: set[str]) -> Iterator[str]:
    """The likely cause of names that differ."""
    for names, others, where in ((found, wanted, "the file"), (wanted, found, "the network")):
        prefix = _common_prefix(names)
        if prefix and not _common_prefix(others) and {name.removeprefix(prefix) for name in names} & others:
            yield f"all names in {where} have the prefix {prefix!r}"
    patterns = [{re.sub(r"\d+", "#", name) for name in names} for names in (wanted, found)]
    if patterns[0] == patterns[1] and (wanted < found or found < wanted):
        more, fewer = ("file", "network") if wanted < found else ("network", "file")
        yield f"the {more} has more stages or layers than the {fewer}"


def _common_prefix(names: set[str]) -> str:
    """The parts up to a dot with which all names begin."""
    firsts = {name.partition(".")[0] for name in names}
    if len(firsts) != 1 or not all("." in name for name in names):
        return ""
    first = firsts.pop() + "."
    return first + _common_prefix({name.removeprefix(first) for name in names})
