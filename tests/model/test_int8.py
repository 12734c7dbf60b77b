"""Networks that hold their weights in eight bits in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conversions import relative, train_a_bit
from dun_zoo import Block, Case, Denoiser, ListOfBlocks
from recovery_runs import measurements
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.export.program import export_program
from lorun_adapt.network.eight_bits import EightBits


def network(stages: int = 3, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return ListOfBlocks([Block(Denoiser(width)) for _ in range(stages)]).eval()


@pytest.fixture
def lorun() -> LoRunModel:
    return lorun_adapt.convert(network(), rank=4)


X = measurements(1)[0]


def add_another_set(lorun: LoRunModel) -> None:
    """Add a set ``other``, trained a bit, and make it active."""
    lorun.copy_adapter("default", "other")
    lorun.set_adapter("other")
    with torch.enable_grad():
        train_a_bit(lorun, X)


def held(model: nn.Module) -> Iterator[Tensor]:
    yield from {id(p): p for p in (*model.parameters(), *model.buffers())}.values()


@pytest.mark.slow
@torch.no_grad()
def test_close_on_every_network(case: Case, tmp_path: Path) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    with torch.enable_grad():
        train_a_bit(lorun, case.inputs)
    before, fingerprint = lorun(*case.inputs), lorun.fingerprint
    lorun.save_pretrained(tmp_path / "floats")
    assert lorun.int8() is lorun
    assert relative(lorun(*case.inputs), before) < 0.02
    assert lorun.fingerprint == fingerprint
    again = lorun_adapt.from_pretrained(tmp_path / "floats", case.net).int8()
    assert torch.equal(next(iter(held(again))).flatten(), next(iter(held(lorun))).flatten())
    assert relative(again(*case.inputs), lorun(*case.inputs)) == 0


@torch.no_grad()
def test_memory_is_that_of_the_numbers(lorun: LoRunModel) -> None:
    before = lorun.report()
    lorun.int8()
    after = lorun.report()
    assert after.network_after.num_parameters == before.network_after.num_parameters
    assert after.network_before == before.network_before
    assert after.network_after.num_bytes == sum(tensor.nbytes for tensor in held(lorun))
    assert after.network_after.num_bytes < 0.3 * before.network_after.num_bytes


@torch.no_grad()
def test_untouched_originals_and_pairs_without_base_too() -> None:
    for made in (
        lorun_adapt.convert(network(), rank=4, share=False),
        lorun_adapt.convert(network(), budget=0.3),
    ):
        before, expected = made.report(), made(*X)
        made.int8()
        assert relative(made(*X), expected) < 0.02
        assert made.report().network_after.num_bytes < 0.35 * before.network_after.num_bytes
        assert made.report().network_before == before.network_before


@torch.no_grad()
def test_files(lorun: LoRunModel, tmp_path: Path) -> None:
    net = network()
    lorun.int8()
    lorun.save_pretrained(tmp_path / "eight", torch.int8)
    lorun.save_pretrained(tmp_path / "floats")
    for name in ("eight", "floats"):
        loaded = lorun_adapt.from_pretrained(tmp_path / name, net)
        assert torch.equal(loaded(*X), lorun(*X)) and not any(isinstance(t, EightBits) for t in held(loaded))
        assert torch.equal(loaded.int8()(*X), lorun(*X))
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in ("eight", "floats")]
    assert sizes[0] < 0.5 * sizes[1]


@torch.no_grad()
def test_state_dicts_hold_ordinary_tensors(lorun: LoRunModel, tmp_path: Path) -> None:
    floats = copy.deepcopy(lorun)
    lorun.int8()
    state = lorun.state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    torch.save(state, tmp_path / "state.pt")
    floats.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(floats(*X), lorun(*X))
    other = lorun_adapt.convert(network(), rank=4)
    with torch.enable_grad():
        train_a_bit(other, X)
    lorun.load_state_dict(other.state_dict())
    assert relative(lorun(*X), other(*X)) < 0.02 and any(isinstance(tensor, EightBits) for tensor in held(lorun))


@torch.no_grad()
def test_swaps_copies_and_dtypes(lorun: LoRunModel) -> None:
    add_another_set(lorun)
    lorun.set_adapter("default")
    expected = {name: (lorun.set_adapter(name), lorun(*X))[1] for name in ("default", "other")}
    lorun.int8()
    copied = copy.deepcopy(lorun)
    for model in (lorun, copied):
        for name, output in expected.items():
            model.set_adapter(name)
            assert relative(model(*X), output) < 0.02
    kernel = copied.base.get_parameter("blocks.0.denoiser.body.weight")
    shared = copied.base.get_parameter("blocks.1.denoiser.body.weight")
    assert isinstance(kernel, EightBits) and kernel is shared
    before = copied(*X)
    assert copied.double()(*(t.double() for t in X)).dtype == torch.float64
    assert torch.allclose(copied.float()(*X), before)
    assert isinstance(copied.base.get_parameter("blocks.0.denoiser.body.weight"), EightBits)
    lorun.merge_adapter()
    merged = lorun(*X)
    lorun.unmerge_adapter()
    assert torch.allclose(lorun(*X), merged, atol=1e-6)
    dense = lorun.merge_and_unload()
    assert torch.allclose(dense(*X), merged, atol=1e-6) and all(type(p) is nn.Parameter for p in dense.parameters())


def test_training(lorun: LoRunModel) -> None:
    net = network()
    lorun.int8()
    assert not any(isinstance(p, EightBits) and p.requires_grad for p in lorun.parameters())
    packed = [p for p in lorun.parameters() if isinstance(p, EightBits)]
    values = [p.float_values() for p in packed]
    lorun.finetune(measurements(), "new", teacher=net, steps=3)
    assert all(map(torch.equal, (p.float_values() for p in packed), values))
    assert any(p.requires_grad for p in lorun.parameters()) and lorun.active_adapters == ["new"]
    lorun.set_adapter("default")
    lorun.delete_adapter("new")
    with pytest.raises(LoRunError, match="in eight bits cannot be trained"):
        lorun.recover(net, measurements(), steps=2)
    with pytest.raises(LoRunError, match="cannot change weights in eight bits"), torch.no_grad():
        packed[0].mul_(2)
    lorun.copy_adapter("default", "mine")
    lorun.set_adapter("mine")
    assert lorun.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in lorun_adapt.convert(net, rank=4).adapters.parameters()
    )
    assert torch.equal(packed[0].float_values(), values[0])


@torch.no_grad()
def test_compiled_and_exported(lorun: LoRunModel) -> None:
    lorun.int8()
    expected = lorun(*X)
    compiled = torch.compile(lorun, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*X), expected, atol=1e-6)
    exported = torch.export.export(lorun.network, X)
    assert torch.allclose(exported.module()(*X), expected, atol=1e-6)


def test_what_a_tensor_in_eight_bits_does() -> None:
    numbers = torch.tensor([[2, -4], [127, 0]], dtype=torch.int8)
    weight = EightBits(numbers, torch.tensor([[0.5], [1.0]]), torch.float32)
    assert torch.equal(weight @ torch.eye(2), torch.tensor([[1.0, -2.0], [127.0, 0.0]]))
    assert weight.half().dtype == torch.float16 and isinstance(weight.half(), EightBits)
    assert isinstance(weight.detach().clone(), EightBits) and weight.nbytes == 12
    with pytest.raises(LoRunError, match="cannot become torch.int64"):
        weight.long()
    with pytest.raises(LoRunError, match="torch.int64 cannot be put in weights in eight bits"):
        weight.copy_(torch.ones(2, 2, dtype=torch.int64))
    assert "EightBits" in repr(weight)
    weight.double().copy_(torch.zeros(2, 2))
    assert weight.float_values().any()
    assert weight.share_memory_() is weight and weight.is_shared()


@torch.no_grad()
def test_weighted_sums(lorun: LoRunModel) -> None:
    add_another_set(lorun)
    floats = copy.deepcopy(lorun)
    lorun.int8()
    for model in (floats, lorun):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "between")
        model.set_adapter("between")
    assert relative(lorun(*X), floats(*X)) < 0.02
    dense = [model.merge_and_unload(adapter_names=["default", "other"])(*X) for model in (floats, lorun)]
    assert relative(dense[1], dense[0]) < 0.02
    lorun.finetune(measurements(), "new", teacher=network(), steps=1, start_from=["default", "other"])
    assert "new" in lorun.adapter_names


@torch.no_grad()
def test_copies_are_of_the_same_base(lorun: LoRunModel, tmp_path: Path) -> None:
    fingerprint = lorun.fingerprint
    lorun.save_pretrained(tmp_path / "sets", adapters_only=True)
    lorun.int8()
    copied = copy.deepcopy(lorun)
    copied.load_adapter(tmp_path / "sets", "again")
    lorun.requires_grad_(True)
    state = lorun.state_dict()
    lorun.load_state_dict(state)
    assert copied.fingerprint == lorun.fingerprint == fingerprint
    assert copied.adapter_names == ["default", "again"]
    train = lorun_adapt.convert(network(), rank=4)
    train.base.get_parameter("blocks.0.denoiser.body.weight").mul_(2)
    lorun.load_state_dict(train.state_dict())
    assert lorun.fingerprint != fingerprint


@torch.no_grad()
def test_state_dicts_hold_the_base_once(lorun: LoRunModel, tmp_path: Path) -> None:
    lorun.int8()
    state = lorun.state_dict()
    names = [f"base.blocks.{stage}.denoiser.body.weight" for stage in range(3)]
    assert state[names[0]] is state[names[1]] is state[names[2]]
    half = copy.deepcopy(lorun).half()
    half.load_state_dict(half.state_dict())
    for part in (lorun.base, lorun.network):
        torch.save(part.state_dict(), tmp_path / "part.pt")
        assert all(type(t) is Tensor for t in torch.load(tmp_path / "part.pt", weights_only=True).values())


@torch.no_grad()
def test_within_disable_adapter(lorun: LoRunModel) -> None:
    with lorun.disable_adapter():
        before = lorun(*X)
        lorun.int8()
        assert lorun.network is lorun.base and relative(lorun(*X), before) < 0.02
    assert lorun.network is not lorun.base


@torch.no_grad()
def test_it_is_done_or_not(lorun: LoRunModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kernel = lorun(*X), lorun.base.get_parameter("blocks.0.denoiser.body.weight")

    def fail(*_: object) -> nn.Module:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(LoRunModel, "_assembled", fail)
        with pytest.raises(MemoryError):
            lorun.int8()
    assert not any(isinstance(tensor, EightBits) for tensor in held(lorun))
    assert torch.equal(lorun(*X), before)
    kernel[0, 0, 0, 0] = float("inf")
    with pytest.raises(LoRunError, match="body.weight.* has NaN or Inf"):
        lorun.int8()
    kernel[0, 0, 0, 0] = 0
    assert lorun.int8() is lorun and lorun.get_nb_trainable_parameters()[0] > 0


@torch.no_grad()
def test_base_denoisers_are_ordinary_and_exports_refused(lorun: LoRunModel) -> None:
    lorun.int8()
    assert all(type(p) is nn.Parameter for p in lorun.base_denoiser().parameters())
    with pytest.raises(LoRunError, match="in eight bits cannot be exported"):
        export_program(lorun.network, lambda size, count: X, 8)
