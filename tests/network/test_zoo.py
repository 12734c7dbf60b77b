"""Every shape of network: found, converted, changed, saved, merged."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import torch
from conversions import FULL, convert_fully, floats_of, relative, train_a_bit
from dun_zoo import ZOO, Case
from torch import Tensor

import lorun_adapt
from lorun_adapt.network.adapter import terms_of
from lorun_adapt.network.assemble import dense_tensors


def stage_weights(lorun: lorun_adapt.LoRunModel) -> dict[tuple[str, int], dict[str, Tensor]]:
    """What each stage's tensors amount to."""
    return {
        (group.name, site.stage): {
            name: tensor.clone()
            for name, tensor in dense_tensors(
                lorun.base.get_submodule(site.module), group, lorun.adapter_of(group, site)
            ).items()
        }
        for group in lorun.stage_map.groups
        for site in group.sites
    }


def test_found_without_help(case: Case) -> None:
    found = lorun_adapt.find_stages(case.net, **case.find())
    assert sorted([site.module for site in group.sites] for group in found.groups) == sorted(case.sites)
    assert len(found) == max(map(len, case.sites))


def test_original_is_left_untouched(case: Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.net.state_dict().items()}
    classes = [type(module) for module in case.net.modules()]
    lorun = convert_fully(case)
    train_a_bit(lorun, case.inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.net.state_dict().items())
    assert [type(module) for module in case.net.modules()] == classes


@torch.no_grad()
def test_original_and_conversion_share_nothing(case: Case) -> None:
    lorun = convert_fully(case)
    original, converted = case.net(*case.inputs), lorun(*case.inputs)
    tensors = floats_of(lorun)
    values = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)
    assert torch.equal(case.net(*case.inputs), original)
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)
    for tensor in floats_of(case.net):
        tensor.add_(1)
    assert not torch.equal(case.net(*case.inputs), original)
    assert torch.equal(lorun(*case.inputs), converted)


def test_full_rank_is_the_original(case: Case) -> None:
    lorun = convert_fully(case)
    terms = [terms_of(lorun.adapter_of(g, s)) for g in lorun.stage_map.groups for s in g.sites]
    assert all(terms) and max(term.rank for held in terms for term in held.values()) < FULL
    assert relative(lorun(*case.inputs), case.net(*case.inputs)) < 1e-5


def test_by_default_no_larger_and_runs(case: Case) -> None:
    lorun = lorun_adapt.convert(case.net, rank=2, **case.find())
    expected = case.net(*case.inputs)
    output = lorun(*case.inputs)
    assert output.shape == expected.shape and bool(output.isfinite().all())
    if case.exact:
        assert torch.equal(output, expected)


def test_a_stage_changes_alone(case: Case) -> None:
    lorun = convert_fully(case, rank=2)
    train_a_bit(lorun, case.inputs)
    for group in lorun.stage_map.groups:
        for site in group.sites:
            before, output = stage_weights(lorun), lorun(*case.inputs).detach()
            for term in terms_of(lorun.adapter_of(group, site)).values():
                torch.nn.init.normal_(term.lora_B)
            after = stage_weights(lorun)
            changed = {
                key for key in before if any(not torch.equal(before[key][n], after[key][n]) for n in before[key])
            }
            assert changed == {(group.name, site.stage)}
            assert not torch.equal(lorun(*case.inputs), output)


def test_the_base_changes_every_stage(case: Case) -> None:
    lorun = convert_fully(case, rank=2)
    before = stage_weights(lorun)
    for group in lorun.stage_map.groups:
        for spec in group.tensors:
            if spec.name in terms_of(lorun.adapter_of(group, group.sites[0])):
                lorun.base.get_parameter(f"{group.sites[-1].module}.{spec.name}").data += 1
    after = stage_weights(lorun)
    for group in lorun.stage_map.groups:
        for site in group.sites:
            for name in terms_of(lorun.adapter_of(group, site)):
                moved = after[group.name, site.stage][name] - before[group.name, site.stage][name]
                torch.testing.assert_close(moved, torch.ones_like(moved))


def test_one_storage_for_the_base(case: Case, tmp_path: Path) -> None:
    lorun = convert_fully(case, rank=2)
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", case.net)
    for model in (lorun, lorun.to(torch.float64), lorun.half().float(), loaded, copy.deepcopy(lorun)):
        pointers: dict[tuple[str, str], set[int]] = {}
        for group in model.stage_map.groups:
            for site in group.sites:
                module = model.network.get_submodule(site.module)
                module = module if site.call is None else module.lorun_calls[site.call]
                for name in terms_of(model.adapter_of(group, site)):
                    path, _, attribute = name.rpartition(".")
                    base = module.get_submodule(path).get_parameter(f"lorun_base_{attribute}")
                    pointers.setdefault((group.name, name), set()).add(base.data_ptr())
        assert pointers and all(len(found) == 1 for found in pointers.values())


def test_merged_is_the_original_class(case: Case) -> None:
    lorun = convert_fully(case)
    plain = lorun.merge_and_unload()
    assert type(plain) is type(case.net)
    fresh = copy.deepcopy(case.net)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter.data)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert relative(fresh(*case.inputs), case.net(*case.inputs)) < 1e-5
    assert relative(plain(*case.inputs), lorun(*case.inputs)) < 1e-6
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in case.net.parameters()]


FRESH_PROCESS = """
import sys, torch, warnings
warnings.simplefilter("ignore")
sys.path[:] = {path!r}
from dun_zoo import ZOO
import transformer_zoo
import lorun_adapt
torch.set_num_threads(1)
outputs = {{}}
for name, build in ZOO.items():
    case = build()
    for parameter in case.net.parameters():
        torch.nn.init.normal_(parameter.data)
    outputs[name] = lorun_adapt.from_pretrained({folder!r} + "/" + name, case.net)(*case.inputs).detach()
torch.save(outputs, {folder!r} + "/outputs.pt")
"""


def test_loaded_in_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = {}
    for name, build in ZOO.items():
        case = build()
        lorun = convert_fully(case, rank=3)
        train_a_bit(lorun, case.inputs)
        lorun.eval().save_pretrained(tmp_path / name)
        expected[name] = lorun(*case.inputs).detach()
        assert bool(expected[name].isfinite().all())
    torch.set_num_threads(threads)
    script = FRESH_PROCESS.format(path=sys.path, folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert [name for name in ZOO if not torch.equal(outputs[name], expected[name])] == []
