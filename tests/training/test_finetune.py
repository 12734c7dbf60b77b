"""A new adapter set on a frozen base."""

from __future__ import annotations

import itertools
import os
import signal
import warnings

import pytest
import torch
from dun_zoo import ZOO, Block, Case, Denoiser, ListOfBlocks
from fine_tuning_runs import converted, error, frozen, noisy, same, stopping, to_half, to_truth
from recovery_runs import launch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.training.duration import learning_rate_schedule
from lorun_adapt.training.optimised import Optimised


def test_only_the_new_set_trains() -> None:
    lorun, _ = converted()
    before, fingerprint, others = frozen(lorun), lorun.fingerprint, error(lorun, noisy(4, seed=9))
    assert lorun.finetune(noisy(), "new", steps=200, loss=to_truth)
    assert same(frozen(lorun), before) and lorun.fingerprint == fingerprint
    assert lorun.active_adapters == ["new"]
    assert error(lorun, noisy(4, seed=9)) < 0.8 * others
    lorun.set_adapter("default")
    assert error(lorun, noisy(4, seed=9)) == others


class Counting(ListOfBlocks):
    """Averages what it has returned, and counts its forwards, in buffers."""

    def __init__(self) -> None:
        super().__init__([Block(Denoiser()) for _ in range(3)])
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = super().forward(y, mask)
        self.seen.mul_(0.9).add_(x.detach().mean())
        self.count = self.count + 1
        return x + 0.1 * self.seen


def test_buffers_that_forwards_change_stay(monkeypatch) -> None:
    torch.manual_seed(0)
    net, other = Counting().eval(), Counting().eval()
    lorun = lorun_adapt.convert(net, rank=2)
    tensors = [dict(module.named_buffers()) for module in (lorun.base, net, other)]
    before = [{name: tensor.clone() for name, tensor in held.items()} for held in tensors]
    lorun.finetune([batch[:2] for batch in noisy()], "new", steps=3, teacher=other)
    for module, held, was in zip((lorun.base, net, other), tensors, before):
        assert all(tensor is held[name] and torch.equal(tensor, was[name]) for name, tensor in module.named_buffers())


def test_every_shape_of_network(case: Case) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    before, start = frozen(lorun), lorun(*case.inputs).detach()
    assert lorun.finetune([case.inputs], "new", steps=5, loss=to_half, held_out=[case.inputs])
    assert same(frozen(lorun), before)
    assert (lorun(*case.inputs) - 0.5).square().mean() <= (start - 0.5).square().mean()


def test_a_teacher_instead_of_the_truth() -> None:
    lorun, net = converted()
    other = ListOfBlocks([Block(Denoiser()) for _ in range(3)]).eval()
    other.load_state_dict({name: 1.1 * tensor for name, tensor in net.state_dict().items()})
    batch = noisy(1)[0][:2]

    def distance() -> float:
        with torch.no_grad():
            return float((lorun(*batch) - other(*batch)).square().mean())

    before = distance()
    assert lorun.finetune([b[:2] for b in noisy()], "new", steps=30, teacher=other)
    assert distance() < 0.7 * before


def test_it_starts_from_the_mean_of_several(monkeypatch) -> None:
    lorun, _ = converted()
    for seed, name in ((3, "a"), (4, "b")):
        lorun.finetune(noisy(seed=seed), name, steps=5, loss=to_truth)
    lorun.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    lorun.set_adapter("mean")
    expected = error(lorun, noisy(2))
    lorun.finetune(noisy(), "new", ["a", "b"], steps=1, loss=lambda output, batch: 0 * output.sum())
    assert error(lorun, noisy(2)) == pytest.approx(expected, rel=1e-5)


def test_few_images_do_not_make_it_worse() -> None:
    """What is trained on has nothing to do with what is held out."""
    lorun, _ = converted()
    judged = noisy(2, seed=5)
    before = error(lorun, judged)
    wrong = [(y, mask, torch.zeros_like(truth)) for y, mask, truth in noisy(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lorun.finetune(wrong, "new", steps=500, loss=to_truth, held_out=judged)
    assert error(lorun, judged) <= before + 1e-7


def test_nothing_to_hold_out_is_said() -> None:
    for batches in (noisy(2), DataLoader(ListDataset(noisy(8)), batch_size=None)):
        lorun, _ = converted()
        with pytest.warns(UserWarning, match="no batches are held out"):
            lorun.finetune(batches, "new", steps=2, loss=to_truth)
    lorun, _ = converted()
    with pytest.warns(UserWarning, match="no batches are held out"):
        lorun.finetune(iter(noisy(2)), "newer", steps=2, loss=to_truth)
    lorun.finetune(iter(noisy(8)), "new", steps=2, loss=to_truth)
    lorun.finetune(noisy(8), "other", steps=2, loss=to_truth, held_out=DataLoader(Stream(), batch_size=None))


def test_what_an_iterator_holds_out_is_never_trained_on() -> None:
    lorun, _ = converted()
    batches = noisy(5)
    trained: set[float] = set()

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        if torch.is_grad_enabled():
            trained.add(float(batch[2].flatten()[0]))
        return to_truth(output, batch)

    lorun.finetune(iter(batches), "new", steps=30, loss=loss)
    assert trained == {float(batch[2].flatten()[0]) for batch in batches[2:]}


class ListDataset(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


class Stream(IterableDataset):
    """Of a loader of these ``len()`` raises a TypeError."""

    def __iter__(self):
        return iter(noisy(8))


def test_it_ends_where_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    lorun, _ = converted()
    rates: list[float] = []
    step = Optimised.step
    monkeypatch.setattr(Optimised, "step", lambda self, scale: (rates.append(scale), step(self, scale)))
    seen: list[int] = []

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(1)
            return output.square().mean()
        return (output - 1).square().mean()

    lorun.finetune(noisy(), "new", steps=500, loss=loss)
    assert 100 < len(seen) < 400
    halved = [round(rate / learning_rate_schedule(number / 500), 3) for number, rate in enumerate(rates)]
    assert [rate for rate, _ in itertools.groupby(halved)] == [1, 0.5, 0.25, 0.125]


def test_runs_repeat_and_resume(tmp_path) -> None:
    def run(**options) -> dict[str, Tensor]:
        lorun, _ = converted()
        lorun.finetune(noisy(), "new", steps=30, loss=options.pop("loss", to_truth), **options)
        return lorun.state_dict()

    whole = run()
    assert same(run(), whole)
    state = tmp_path / "state.safetensors"
    steps = 0

    def interrupted(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if steps == 14:
            steps += 1
            os.kill(os.getpid(), signal.SIGINT)
        return to_truth(output, batch)

    with pytest.warns(UserWarning, match="fine-tuning was stopped"):
        run(loss=interrupted, resume_from=state)
    assert state.exists()
    assert same(run(resume_from=state), whole)
    with pytest.warns(UserWarning, match="over already"):
        assert same(run(resume_from=state), whole)


def test_a_state_is_of_one_noise_and_one_start(tmp_path) -> None:
    state = tmp_path / "state.safetensors"
    lorun, _ = converted()
    lorun.copy_adapter("default", "other")
    with torch.no_grad():
        for parameter in lorun.adapters["other"].parameters():
            parameter.mul_(1.1)
    given = {"steps": 30, "loss": to_truth, "resume_from": state}
    with pytest.warns(UserWarning, match="fine-tuning was stopped"):
        lorun.finetune(noisy(), "new", sigma=5, **(given | {"loss": stopping()}))
    before = {name: tensor.clone() for name, tensor in lorun.state_dict().items()}
    for start, noise in (("default", 250), ("other", 5)):
        with pytest.raises(LoRunError, match="belongs to another run"):
            lorun.finetune(noisy(), "new", start, sigma=noise, **given)
        assert same(lorun.state_dict(), before) and lorun.adapter_info["new"].sigma == 5 and state.exists()
    assert lorun.finetune(noisy(), "new", sigma=5, **given)


def test_a_stopped_set_is_gone_on_with(tmp_path) -> None:
    def run(lorun: LoRunModel, loss=to_truth) -> None:
        lorun.finetune(noisy(), "new", steps=30, loss=loss, resume_from=tmp_path / "state.safetensors")

    whole = converted()[0]
    run(whole)
    (tmp_path / "state.safetensors").unlink()
    lorun, net = converted()
    with pytest.warns(UserWarning, match="fine-tuning was stopped"):
        run(lorun, stopping())
    lorun.save_pretrained(tmp_path / "saved")
    with pytest.raises(LoRunError, match="the set 'new' already exists"):
        lorun.finetune(noisy(), "new", steps=30, loss=to_truth)
    before = {name: tensor.clone() for name, tensor in lorun.state_dict().items()}
    with pytest.raises(LoRunError, match="no adapter set 'nothing'"):
        lorun.finetune(noisy(), "new", "nothing", steps=30, loss=to_truth, resume_from=tmp_path / "state.safetensors")
    assert same(lorun.state_dict(), before) and lorun.active_adapters == ["new"]
    again = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    run(again)
    assert same(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((noisy(), "new"), {"steps": 3}, "nothing to minimise: give loss="),
        ((noisy(), "default"), {"steps": 3, "loss": to_truth}, "the set 'default' already exists"),
        ((noisy(), "new", "nothing"), {"steps": 3, "loss": to_truth}, "no adapter set 'nothing'"),
        ((noisy(), "new", ["default", "nothing"]), {"steps": 3, "loss": to_truth}, "no adapter set 'nothing'"),
        ((noisy(), "default", []), {"steps": 3, "loss": to_truth}, "the set 'default' already exists"),
        ((noisy(), "new", []), {"steps": 3, "loss": to_truth}, "as many weights as adapters"),
        ((noisy(), "a/b"), {"steps": 3, "loss": to_truth}, "cannot be called 'a/b'"),
        ((noisy(), "new"), {"loss": to_truth}, "neither minutes nor steps"),
        ((iter([]), "new"), {"steps": 3, "loss": to_truth}, "calibration has no batches"),
        ((iter([(torch.rand(2, 3),)] * 4), "new"), {"steps": 3, "loss": to_truth}, "cannot run on the first batch"),
        ((noisy(), "new"), {"steps": 3, "teacher": nn.Linear(2, 2)}, "the original network as teacher"),
        ((noisy(), "new"), {"steps": 3, "loss": lambda *_: torch.tensor(float("nan"))}, "the loss is NaN or Inf"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(arguments, options, message: str) -> None:
    lorun, _ = converted()
    before = {name: tensor.clone() for name, tensor in lorun.state_dict().items()}
    with pytest.raises(LoRunError, match=message):
        lorun.finetune(*arguments, **options)
    assert same(lorun.state_dict(), before)
    assert lorun.adapter_names == ["default"] and lorun.active_adapters == ["default"]


def test_ctrl_c_keeps_the_best_so_far() -> None:
    lorun, _ = converted()
    before = error(lorun, noisy(2))
    judged: list[float] = []

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        found = to_truth(output, batch)
        if not torch.is_grad_enabled():
            judged.append(float(found))
            if sum(judged[-2:]) < sum(judged[:2]) and len(judged) % 2 == 0:  # a check, of two batches, was better
                os.kill(os.getpid(), signal.SIGINT)
        return found

    with pytest.warns(UserWarning, match="fine-tuning was stopped"):
        assert not lorun.finetune(noisy(), "new", steps=500, loss=loss)
    assert len(judged) < 50 and error(lorun, noisy(2)) < before


def test_it_is_saved_beside_the_others(tmp_path) -> None:
    lorun, net = converted()
    lorun.finetune(noisy(), "sigma25", steps=5, loss=to_truth)
    batch = noisy(1)[0][:2]
    expected = lorun(*batch)
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    assert loaded.adapter_names == ["default", "sigma25"]
    assert torch.equal(loaded(*batch), expected)


def test_a_loop_trains_its_calls_apart() -> None:
    case = ZOO["looped"]()
    lorun = lorun_adapt.convert(case.net, rank=2, calls={"p": 4})
    lorun.finetune([case.inputs], "new", steps=5, loss=to_half, held_out=[case.inputs])
    group = lorun.stage_map.groups[0]
    first, last = (lorun.adapter_of(group, site) for site in (group.sites[0], group.sites[-1]))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters()))


def test_a_set_that_only_runs_stays_frozen_where_training_fails() -> None:
    lorun, _ = converted()
    lorun.set_adapter("default", inference_mode=True)
    with pytest.raises(LoRunError, match="nothing to minimise"):
        lorun.finetune(noisy(), "new", steps=3)
    assert not any(p.requires_grad for p in lorun.parameters())


LAUNCHED = """
import sys
from safetensors.torch import save_file
from lorun_adapt.training.processes import process_state
from fine_tuning_runs import converted, noisy, to_truth

lorun, _ = converted()
lorun.finetune(noisy(2 + 2 * 12), "new", steps=12, loss=to_truth)
assert process_state().num_processes == 2
if process_state().is_main_process:
    save_file({"output": lorun(*noisy(1)[0][:2]).detach()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path) -> None:
    found = launch(LAUNCHED, tmp_path)
    lorun, _ = converted()
    batches = noisy(2 + 2 * 12)
    pairs = [(torch.cat([a[0], b[0]]), a[1], torch.cat([a[2], b[2]])) for a, b in zip(batches[2::2], batches[3::2])]
    batch = noisy(1)[0][:2]
    start = lorun(*batch).detach()
    lorun.finetune(pairs, "new", steps=12, loss=to_truth, held_out=batches[:2])
    output = lorun(*batch).detach()  # parameters without a gradient may differ
    assert (found["output"] - output).norm() < 0.15 * (output - start).norm()


def test_resuming_leaves_other_sets_alone(tmp_path) -> None:
    lorun, net = converted()
    state, steps = tmp_path / "state.safetensors", 0

    def interrupted(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return to_truth(output, batch)

    lorun.copy_adapter("default", "a")
    lorun.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="fine-tuning was stopped"):
        lorun.finetune(noisy(), "new", steps=30, loss=interrupted, resume_from=state)
    again = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    again.set_adapter("a")
    with torch.no_grad():
        for parameter in again.adapters["a"].parameters():
            parameter.mul_(2)
    before = frozen(again)
    assert again.finetune(noisy(), "new", steps=30, loss=to_truth, resume_from=state)
    assert same(frozen(again), before)


def test_where_tensors_have_no_base(tmp_path) -> None:
    """Sets on a network that a budget has converted are trained, summed, saved and loaded like any others."""
    _, net = converted()
    lorun = lorun_adapt.convert(net, budget=0.5)
    alone = [spec.name for spec in lorun.stage_map.groups[0].tensors if spec.without_base]
    assert alone
    before = frozen(lorun)
    assert lorun.finetune(noisy(), "new", steps=50, loss=to_truth)
    assert same(frozen(lorun), before)
    batch = noisy(1)[0][:2]
    expected = lorun(*batch).detach()
    lorun.save_pretrained(tmp_path / "saved")
    lorun.add_weighted_adapter(["default", "new"], [0.5, 0.5], "between")
    lorun.load_adapter(tmp_path / "saved", "new")
    assert torch.equal(lorun(*batch), expected)
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    loaded.set_adapter("new")
    assert torch.equal(loaded(*batch), expected)
    state = lorun.state_dict()
    name = f"base.{lorun.stage_map.groups[0].sites[0].module}.{alone[0]}"
    state[name] = state[name] + 1
    with pytest.raises(LoRunError, match="has no base here"):
        lorun.load_state_dict(state)
    assert torch.equal(lorun(*batch), expected)
