"""Folders that version 0.1.0 saved load to the same bits: ``saved_before`` holds them, and what they amount to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dun_zoo import ZOO
from safetensors.torch import load_file

import lorun_adapt
from lorun_adapt.network.converted import AdapterInfo, Quality

SAVED = Path(__file__).parent / "saved_before"
NETWORKS = {
    "list_of_blocks": "list_of_blocks",
    "list_of_blocks_within_a_budget": "list_of_blocks",
    "list_of_denoisers": "list_of_denoisers",
    "looped": "looped",
    "encoder_decoder": "encoder_decoder",
}


def load(name: str) -> lorun_adapt.LoRunModel:
    return lorun_adapt.from_pretrained(SAVED / name, ZOO[NETWORKS[name]]().net).eval()


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for how other processors round convolutions."""
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_loads_to_the_same_bits(name: str) -> None:
    lorun, expected = load(name), load_file(SAVED / f"{name}.expected.safetensors")
    state = {key.removeprefix("state_dict/"): t for key, t in expected.items() if key.startswith("state_dict/")}
    held = lorun.state_dict()
    assert held.keys() == state.keys()
    assert [key for key in state if held[key].dtype != state[key].dtype or not torch.equal(held[key], state[key])] == []
    inputs = ZOO[NETWORKS[name]]().inputs
    close(lorun(*inputs), expected["output"])
    for adapter_name in lorun.adapter_names:
        lorun.set_adapter(adapter_name)
        close(lorun(*inputs), expected[f"output of {adapter_name}"])


def test_what_the_sets_are_for_and_what_was_measured() -> None:
    lorun = load("list_of_denoisers")
    assert list(lorun.adapter_info) == ["default", "sigma25"] and lorun.adapter_info["default"] == AdapterInfo()
    assert lorun.adapter_info["sigma25"].sigma == 25
    assert lorun.adapter_info["sigma25"].quality == (Quality("photographs", 8, 25.0, 30.5, 0.9),)
    assert set(lorun.outside_of("sigma25")) == {"steps"}
    assert lorun.network.steps is lorun.outside_of("sigma25")["steps"]
    assert not torch.equal(lorun.network.steps, lorun.base.steps)
    about = load("list_of_blocks").adapter_info
    assert about["default"].quality == (Quality("photographs", 8, 0.0, 30.5, 0.9, 31.0, 0.92),)
    assert about["default"].sigma is None and about["other"] == AdapterInfo()


def test_which_sets_run() -> None:
    """In each stage the set that ran there when the folder was saved."""
    lorun = load("list_of_blocks")
    chosen = {0: "default", 1: "other", 2: "default", 3: "other"}
    assert lorun.active_adapters == chosen
    output = lorun(*ZOO["list_of_blocks"]().inputs)
    lorun.set_adapter(chosen)
    assert torch.equal(lorun(*ZOO["list_of_blocks"]().inputs), output)


def test_tensors_without_a_base() -> None:
    lorun = load("list_of_blocks_within_a_budget")
    without = [spec.name for spec in lorun.stage_map.groups[0].tensors if spec.without_base]
    assert without and not any(lorun.base.get_parameter(f"blocks.0.{name}").any() for name in without)
