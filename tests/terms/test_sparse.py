"""Sparse terms, alone and beside low-rank pairs: fitted, saved, swapped, added, trained, exported."""

from __future__ import annotations

import shutil

import pytest
import torch
from dun_zoo import ZOO
from recovery_runs import distance, measurements, teacher
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError, SparseConfig
from lorun_adapt.stages.stage_map import TensorSpec
from lorun_adapt.terms.registry import TERMS
from lorun_adapt.terms.sparse import LowRankAndSparse, Sparse
from lorun_adapt.terms.term import Setting, Term, Weighting
from lorun_adapt.util.nested import tensors_in

KINDS = [Sparse, LowRankAndSparse]
SHAPE = (8, 4, 3, 3)
SPEC = TensorSpec("weight", SHAPE, torch.float32, False, ("weight",), nn.Conv2d)  # folds to (8, 36)


def stages(count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tensors that share a base, but for some entries that differ much."""
    generator = torch.Generator().manual_seed(0)
    base, own = torch.randn(SHAPE, generator=generator), torch.randn(count, *SHAPE, generator=generator)
    rare = torch.rand(own.shape, generator=generator) < 0.1
    return (base + torch.where(rare, 5 * own, 0.1 * own)).to(dtype)


def composed(fitted, stack: torch.Tensor) -> torch.Tensor:
    return torch.stack([term(fitted.base) for term in fitted.terms]).view_as(stack).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without_base", [False, True])
def test_the_fit_is_as_close_as_it_says(kind: type[Term], without_base: bool) -> None:
    spec = TensorSpec("weight", SHAPE, torch.float32, False, ("weight",), nn.Conv2d, without_base=without_base)
    lost = []
    for rank in (1, 3):
        fitted = kind.fit(stages(), spec, Setting(rank))
        assert bool(fitted.base.any()) is not without_base
        assert fitted.terms[0].rank == rank and fitted.terms[0].values.numel() == rank * (8 + 36)
        found = (composed(fitted, stages()) - stages()).square().flatten(1).sum(1)
        assert torch.allclose(found, fitted.lost.float(), rtol=1e-4)
        lost.append(float(fitted.lost.sum()))
    assert lost[1] < lost[0]


def test_sparse_terms_find_what_differs() -> None:
    """Of 288 entries a tenth differs much: 44 are enough, and no low-rank pair is."""
    energies = {}
    for kind in (Sparse, TERMS["LORA"]):
        energies[kind] = float(kind.fit(stages(), SPEC, Setting(1)).lost.sum())
    assert energies[Sparse] < 0.1 * energies[TERMS["LORA"]]


def test_no_other_choice_of_entries_loses_less_with_this_base() -> None:
    fitted = Sparse.fit(stages(), SPEC, Setting(1))
    rest = (stages() - fitted.base).abs().flatten(1)
    best = rest.sort(dim=1).values[:, : -(8 + 36)].square().sum(1)
    assert torch.allclose(best, fitted.lost.float(), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_in_rows_that_matter_come_first(kind: type[Term]) -> None:
    rows = torch.diag(torch.tensor([1e4] + [1.0] * 7)).expand(5, 8, 8)
    weighted = kind.fit(stages(), SPEC, Setting(1), weighting=Weighting(rows, torch.ones(5, 1, 1), 0.0))
    plain = kind.fit(stages(), SPEC, Setting(1))
    first = [(composed(fitted, stages()) - stages())[:, 0].square().sum() for fitted in (weighted, plain)]
    assert first[0] < 0.1 * first[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_term_keeps_the_largest_entries(kind: type[Term]) -> None:
    """With the values that they had before."""
    term, start = (kind.fit(scale * stages(), SPEC, Setting(3)).terms[0] for scale in (2, 1))
    less = term.pruned(1, start)
    assert less.rank == 1 and set(less.places.tolist()) < set(term.places.tolist())
    chosen = torch.isin(term.places, less.places)
    values = term.values.abs().flatten()
    assert values[chosen].min() >= values[~chosen].max()
    assert torch.equal(less.values.flatten(), start.values.flatten()[chosen])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels", "attention"])
def test_convert_swap_save_load_sum_and_merge(kind: type[Term], name: str, tmp_path) -> None:
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, SparseConfig(1, low_rank=kind is LowRankAndSparse), **case.find())
    assert {type(m) for m in lorun.adapters.modules() if isinstance(m, Term)} == {kind}
    lorun.copy_adapter("default", "other")
    with torch.no_grad():
        for parameter in lorun.adapters["other"].parameters():
            parameter.mul_(1.5)
    before = tensors_in(lorun(*case.inputs))[0]
    lorun.set_adapter("other")
    other = tensors_in(lorun(*case.inputs))[0]
    assert not torch.equal(other, before)
    lorun.add_weighted_adapter(["default", "other"], [0.0, 1.0], "sum")
    lorun.set_adapter("sum")
    again = tensors_in(lorun(*case.inputs))[0]
    assert torch.allclose(again, other, atol=1e-5)
    lorun.set_adapter("other")
    lorun.delete_adapter("sum")
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", case.net)
    assert torch.equal(tensors_in(loaded(*case.inputs))[0], other)
    state = lorun.state_dict()
    fresh = lorun_adapt.from_pretrained(tmp_path / "saved", case.net)
    fresh.load_state_dict(state)
    assert torch.equal(tensors_in(fresh(*case.inputs))[0], other)
    merged = tensors_in(lorun.merge_and_unload()(*case.inputs))[0]
    assert torch.allclose(merged, other, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_tensors(kind: type[Term]) -> None:
    stack = torch.complex(stages(), stages().flip(0))
    spec = TensorSpec("weight", SHAPE, torch.complex64, False, ("weight",), nn.Conv2d)
    fitted = kind.fit(stack, spec, Setting(2))
    found = (composed(fitted, stack) - stack).abs().square().flatten(1).sum(1)
    assert torch.allclose(found, fitted.lost.float(), rtol=1e-4)


@pytest.mark.parametrize("low_rank", [False, True])
def test_they_are_recovered_and_tuned(low_rank: bool) -> None:
    """From the closed form on."""
    net = teacher()
    lorun = lorun_adapt.convert(net, SparseConfig(1, low_rank))
    start = distance(lorun, net)
    assert lorun.recover(net, measurements(), steps=60)
    assert distance(lorun, net) < 0.3 * start


def test_a_new_set_is_tuned_from_zeros() -> None:
    lorun = lorun_adapt.convert(teacher(), SparseConfig(1))
    lorun.add_adapter("new", SparseConfig(1))
    terms = [module for module in lorun.adapters["new"].modules() if isinstance(module, Term)]
    assert terms and not any(term.values.any() for term in terms)

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (output - 0.5 * batch[0]).square().mean()

    y = measurements()[0]
    lorun.set_adapter("new")
    before = float(loss(lorun(*y), y).detach())
    lorun.finetune(measurements(), "tuned", "new", loss=loss, steps=60)
    assert loss(lorun(*y), y) < 0.95 * before


def test_eight_bits_and_half_precision(tmp_path) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, SparseConfig(2))
    y = measurements()[0]
    for dtype, error in ((torch.float16, 1e-3), (torch.int8, 0.05)):
        lorun.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        loaded = lorun_adapt.from_pretrained(tmp_path / str(dtype), net)
        assert (loaded(*y) - lorun(*y)).norm() < error * lorun(*y).norm()


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    net = teacher()
    with pytest.raises(LoRunError, match="a sparse term has no scaling, found 2 for"):
        config = SparseConfig(2)
        config.lora_alpha = 4
        lorun_adapt.convert(net, config)
    lorun = lorun_adapt.convert(net, SparseConfig(2))
    with pytest.raises(LoRunError, match="a sparse term has no scaling: leave lora_alpha out"):
        SparseConfig(2, lora_alpha=4)
    lorun.save_pretrained(tmp_path / "saved")
    (stage, *_) = sorted((tmp_path / "saved/adapters/default").glob("stage_*"))
    shutil.copytree(stage, tmp_path / "alone")  # without the hashes of the whole
    lorun.load_adapter(tmp_path / "alone", "default", stage=0)
    file = tmp_path / "alone/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".bits"))
    assert tensors[name].dtype == torch.uint8
    tensors[name] = tensors[name] ^ 1
    with safe_open(file, "pt") as stored:
        save_file(tensors, file, stored.metadata())
    before = lorun.adapters["default"].state_dict()
    with pytest.raises(LoRunError, match="expected places for the .* values of a sparse term, found"):
        lorun.load_adapter(tmp_path / "alone", "default", stage=0)
    assert all(torch.equal(value, before[key]) for key, value in lorun.adapters["default"].state_dict().items())


def test_a_rank_for_some_tensors() -> None:
    lorun = lorun_adapt.convert(teacher(), SparseConfig(2, rank_pattern={"body": 1}))
    ranks = lorun.stage_map.ranks["denoiser"]
    assert ranks["denoiser.body.weight"] == 1 and ranks["denoiser.head.weight"] == 2


def test_terms_with_other_places_are_pruned_to_their_values() -> None:
    fitted = Sparse.fit(stages(), SPEC, Setting(2))
    less = fitted.terms[0].pruned(1, fitted.terms[1])
    dense = fitted.terms[1](torch.zeros(SHAPE)).flatten()
    assert torch.equal(less.values.flatten(), dense[less.places.long()])


def test_they_compile_without_a_graph_break() -> None:
    net, batch = teacher(), measurements()[0]
    lorun = lorun_adapt.convert(net, SparseConfig(1)).eval()
    compiled = torch.compile(lorun.network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(*batch), lorun(*batch), atol=1e-6)
