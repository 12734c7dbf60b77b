"""The caller's torch modes change nothing about weights that are computed or trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from dun_zoo import ZOO
from torch import Tensor

import lorun_adapt
from lorun_adapt import LoRunModel

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
CASE = ZOO["list_of_blocks"]


def everything(folder: Path, mode: Callable[[], AbstractContextManager]) -> dict[str, Tensor]:
    """All tensors after each operation that computes weights, each within ``mode``."""
    case, found = CASE(), {}

    def note(name: str, lorun: LoRunModel) -> LoRunModel:
        assert not any(tensor.is_inference() for tensor in lorun.state_dict().values())
        found.update({f"{name} {key}": tensor.clone() for key, tensor in lorun.state_dict().items()})
        return lorun

    batches = [case.inputs]
    with mode():
        lorun = note("convert", lorun_adapt.convert(case.net, rank=2, calibration=batches, steps=3))
        note("budget", lorun_adapt.convert(case.net, budget=0.9, calibration=batches, steps=2))
        lorun.recover(case.net, batches, steps=3)
        note("recover", lorun)
        options = {"steps": 3, "loss": lambda output, _: output.square().mean(), "held_out": batches}
        lorun.finetune(batches, "tuned", **options)
        lorun.add_weighted_adapter(["default", "tuned"], [0.5, 0.5], "mean")
        lorun.copy_adapter("mean", "copy")
        lorun.set_adapter({0: "copy", 1: "tuned"})
        note("sets", lorun)
        lorun.save_pretrained(folder)
        loaded = note("load", lorun_adapt.from_pretrained(folder, case.net))
        loaded.load_adapter(folder, "mean")
        merged = loaded.merge_and_unload()
        lorun_adapt.fit(merged, batches, loss=options["loss"], steps=3, held_out=batches)
    found.update({f"merge and fit {key}": tensor.clone() for key, tensor in merged.state_dict().items()})
    (loaded(*case.inputs).sum() + merged(*case.inputs).sum()).backward()  # what trains still does
    assert any(parameter.grad is not None for parameter in loaded.parameters())
    assert all(parameter.grad is not None for parameter in merged.parameters())
    return found


@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_the_callers_modes(mode: str, tmp_path: Path) -> None:
    expected, found = everything(tmp_path / "plain", nullcontext), everything(tmp_path / "mode", MODES[mode])
    assert expected.keys() == found.keys() and len(expected) > 100
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_forward_is_in_the_callers_modes() -> None:
    case = CASE()
    lorun = lorun_adapt.convert(case.net, rank=2)
    with torch.inference_mode():
        assert lorun(*case.inputs).is_inference()
    with torch.no_grad():
        assert not lorun(*case.inputs).requires_grad
    assert lorun(*case.inputs).requires_grad
