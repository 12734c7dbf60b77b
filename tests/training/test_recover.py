"""Recovery: what it improves, what it leaves alone, and how it is stopped, resumed and repeated."""

from __future__ import annotations

import copy
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from dun_zoo import Block, Case, Denoiser, ListOfBlocks
from peft import LoraConfig
from recovery_runs import (
    Batch,
    Stopping,
    distance,
    launch,
    mean_squared_error,
    measurements,
    same,
    saved_storages,
    teacher,
    values,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.cli.demo import shipped
from lorun_adapt.network.observe import Observer
from lorun_adapt.task.task import load_task
from lorun_adapt.training import distill, recovery
from lorun_adapt.training.distill import Distillation
from lorun_adapt.training.state_file import read_state, write_state
from lorun_adapt.util.toy import ToyStage, ToyUnfoldingNet


def test_every_shape_of_network_recovers(case: Case) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    before = distance(lorun, case.net, case.inputs)
    original = copy.deepcopy(case.net.state_dict())
    assert lorun.recover(case.net, [case.inputs], steps=60)
    after = distance(lorun, case.net, case.inputs)
    assert after < 0.5 * before or before < 1e-9 and after < 1e-9
    assert all(torch.equal(tensor, original[name]) for name, tensor in case.net.state_dict().items())
    assert not any(p.requires_grad for p in lorun.base.parameters())
    if not case.run_to_find and not case.exact:  # one module for several stages holds no merged weights
        merged = distance(lorun.merge_and_unload(), case.net, case.inputs)
        assert merged == pytest.approx(after, rel=1e-3, abs=1e-9)


class WithExtraState(Block):
    def get_extra_state(self) -> dict[str, int]:
        return {"iteration": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"iteration": 3}


def test_states_beyond_tensors(tmp_path) -> None:
    torch.manual_seed(0)
    net, batches = ListOfBlocks([WithExtraState(Denoiser()) for _ in range(3)]).eval(), measurements()
    net.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn))
    lorun = lorun_adapt.convert(net, rank=1)
    before = distance(lorun, net)
    assert lorun.recover(net, batches, steps=30, resume_from=tmp_path / "state")
    assert distance(lorun, net) < before
    assert lorun.finetune(batches, "new", steps=2, teacher=net)


def test_convert_recovers_and_saves(tmp_path) -> None:
    net, batches = teacher(), measurements()
    plain = lorun_adapt.convert(net, LoraConfig(r=2, lora_alpha=2))
    lorun = lorun_adapt.convert(net, LoraConfig(r=2, lora_alpha=2), calibration=batches, steps=60)
    assert distance(lorun, net) < 0.3 * distance(plain, net)
    assert lorun.num_parameters() == plain.num_parameters()
    again = lorun_adapt.convert(net, LoraConfig(r=2, lora_alpha=2))
    again.recover(teacher=net, calibration=batches, steps=60)
    assert same(values(again), values(lorun))
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", teacher())
    with torch.no_grad():
        assert torch.equal(loaded(*batches[0]), lorun(*batches[0]))
    timed = lorun_adapt.convert(net, rank=2, calibration=batches, minutes=0.02)
    assert distance(timed, net) < distance(plain, net)


def test_modes_and_random_numbers_of_the_caller_stay() -> None:
    net = teacher().train()
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.train()
    torch.manual_seed(5)
    lorun.recover(net, measurements(), steps=2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert net.training and lorun.training and lorun.network.training


# --- stopped, resumed, repeated ------------------------------------------------------------------


@pytest.mark.parametrize("steps, at", [(30, 6), (30, 11), (100, 13), (100, 26)])  # stage by stage, and end to end
@pytest.mark.parametrize("how", ["signal", "exception"])
def test_ctrl_c_keeps_the_best_and_resumes_to_the_bit(how, steps, at, tmp_path) -> None:
    net, checkpoint = teacher(), tmp_path / "state.safetensors"
    whole = lorun_adapt.convert(net, rank=2)
    whole.recover(net, Stopping(-1, how), steps=steps)
    lorun = lorun_adapt.convert(net, rank=2)
    before, handler = distance(lorun, net), signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="stopped"):
        assert not lorun.recover(net, Stopping(at, how), steps=steps, resume_from=checkpoint)
    assert distance(lorun, net) < before and checkpoint.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    lorun = lorun_adapt.convert(net, rank=2)  # as in another process
    assert lorun.recover(net, Stopping(-1, how), steps=steps, resume_from=checkpoint)
    assert same(values(lorun), values(whole))
    again = lorun_adapt.convert(net, rank=2)  # the result is kept until it is saved
    with pytest.warns(UserWarning, match="over already: remove the file"):
        assert again.recover(net, Stopping(-1, how), steps=steps, resume_from=checkpoint)
    assert same(values(again), values(whole))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_ctrl_c_before_the_first_step(at, tmp_path) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=2)
    before = values(lorun)
    if at == 0:
        with pytest.raises(KeyboardInterrupt):
            lorun.recover(net, Stopping(at, "exception"), steps=30)
    else:
        with pytest.warns(UserWarning, match="stopped"):
            assert not lorun.recover(net, Stopping(at, "signal"), steps=30, resume_from=tmp_path / "state")
    assert same(values(lorun), before)


def test_ctrl_c_before_a_resumed_run_goes_on_keeps_what_it_had(tmp_path) -> None:
    net, state = teacher(), tmp_path / "state.safetensors"
    lorun = lorun_adapt.convert(net, rank=2)
    with pytest.warns(UserWarning, match="stopped"):
        lorun.recover(net, Stopping(11, "signal"), steps=30, resume_from=state)
    again = lorun_adapt.convert(net, rank=2)
    with pytest.warns(UserWarning, match="stopped"):
        assert not again.recover(net, Stopping(1, "signal"), steps=30, resume_from=state)
    assert same(values(again), values(lorun))


def test_the_state_of_complex_tensors_is_read_as_it_was_written(tmp_path) -> None:
    tensors = [torch.randn(3, 2, dtype=kind) for kind in (torch.complex64, torch.complex128, torch.float64)]
    write_state(tmp_path / "state", "a run", {"tensors": tensors, "step": 3})
    state = read_state(tmp_path / "state", "a run")
    assert state["step"] == 3 and all(torch.equal(a, b) for a, b in zip(state["tensors"], tensors))
    assert [tensor.dtype for tensor in state["tensors"]] == [tensor.dtype for tensor in tensors]


def test_a_shuffled_loader_resumes_to_the_bit(tmp_path) -> None:
    net, checkpoint = teacher(), tmp_path / "state.safetensors"
    images, masks = (torch.cat(parts) for parts in zip(*[(y, mask.expand_as(y)) for y, mask in measurements()]))

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(images, masks), batch_size=5, shuffle=True)

    def run(calibration, **options) -> dict[str, Tensor]:
        lorun = lorun_adapt.convert(net, rank=2, calibration=calibration, steps=25, **options)
        return values(lorun)

    class Interrupted:
        def __init__(self) -> None:
            self.loader, self.drawn = loader(), 0

        def __iter__(self) -> Iterator[Batch]:
            for batch in self.loader:
                if self.drawn == 10:
                    raise KeyboardInterrupt
                self.drawn += 1
                yield batch

    whole = run(loader())
    torch.manual_seed(123)  # the caller's own random state is of no consequence
    assert same(run(loader()), whole)
    with pytest.warns(UserWarning, match="stopped"):
        run(Interrupted(), resume_from=checkpoint)
    assert same(run(loader(), resume_from=checkpoint), whole)
    assert not same(run(loader(), seed=1), whole)


def test_a_state_of_another_run_is_refused(tmp_path) -> None:
    net, checkpoint = teacher(), tmp_path / "state.safetensors"
    with pytest.warns(UserWarning, match="stopped"):
        lorun_adapt.convert(net, rank=2, calibration=Stopping(11, "exception"), steps=30, resume_from=checkpoint)
    lorun = lorun_adapt.convert(net, rank=1)
    before = values(lorun)
    with pytest.raises(LoRunError, match="belongs to another run"):
        lorun.recover(net, measurements(), steps=30, resume_from=checkpoint)
    checkpoint.write_bytes(b"no such thing")
    with pytest.raises(LoRunError, match="cannot read the state file"):
        lorun.recover(net, measurements(), steps=30, resume_from=checkpoint)
    assert same(values(lorun), before)


def test_outside_the_main_thread() -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=1)
    finished = []
    thread = threading.Thread(target=lambda: finished.append(lorun.recover(net, measurements(), steps=3)))
    thread.start()
    thread.join()
    assert finished == [True]


# --- NaN -----------------------------------------------------------------------------------------


def test_nan_is_rolled_back() -> None:
    net = teacher()
    calls = []

    def loss(output: Tensor, batch: Batch) -> Tensor:
        calls.extend([1] * torch.is_grad_enabled())
        error = (output - batch[0]).square().mean()
        return error * float("nan") if len(calls) == 10 and torch.is_grad_enabled() else error

    lorun = lorun_adapt.convert(net, rank=1)
    with pytest.warns(UserWarning, match="the loss is nan at step .*half the learning rate"):
        assert lorun.recover(net, measurements(), steps=30, loss=loss)
    assert all(torch.isfinite(tensor).all() for tensor in lorun.state_dict().values())
    with pytest.raises(LoRunError, match="the loss is NaN or Inf before training"):
        lorun.recover(net, measurements(), steps=5, loss=lambda output, batch: output.sum() * float("nan"))


def test_batches_with_nan_are_left_out() -> None:
    net, batches = teacher(), measurements()
    batches[4] = (batches[4][0] * float("nan"), batches[4][1])
    lorun = lorun_adapt.convert(net, rank=2)
    before = distance(lorun, net)
    with pytest.warns(UserWarning, match="the batch is skipped"):
        lorun.recover(net, batches, steps=30)
    assert distance(lorun, net) < before
    kept = values(lorun)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LoRunError, match="6 batches of calibration in a row have NaN or Inf"):
            lorun.recover(net, [batches[4]], steps=3)
        assert same(values(lorun), kept)
        with pytest.raises(LoRunError, match="remove such batches"):
            lorun.recover(net, [*batches[:4], *[batches[4]] * 20], steps=30)
    assert all(torch.isfinite(tensor).all() for tensor in values(lorun).values())


# --- networks that work in place, draw random numbers, or return more than an image ----------------


class Odd(nn.Module):
    """A stage that adds noise of its own, and changes its input and its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        y.mul_(1.01)
        out = self.denoiser(x + 0.05 * torch.randn_like(x))
        return {"log": [out.detach().mean().item()], "image": out, "residual": 1e-6 * self.denoiser(y)}


class OddNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Odd() for _ in range(3))

    def forward(self, y: Tensor) -> dict[str, object]:
        x, residuals = y.clone(), []
        for block in self.blocks:
            found = block(x, y)
            x = found["image"]
            x.add_(y, alpha=0.1)
            residuals.append(found["residual"])
        return {"residuals": residuals, "restored": x, "time": 3}


def odd() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return OddNetwork().eval(), [torch.rand(4, 1, 8, 8, generator=generator) for _ in range(4)]


def test_in_place_random_and_nested() -> None:
    net, batches = odd()
    kept = [batch.clone() for batch in batches]
    lorun = lorun_adapt.convert(net, rank=1)

    def error(seed: int) -> float:
        outputs = []
        for network in (lorun, net):
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs.append(network(batches[0].clone())["restored"])
        return float((outputs[0] - outputs[1]).square().mean())

    before = error(1)
    lorun.recover(net, batches, steps=60)
    assert error(1) < 0.4 * before
    assert all(torch.equal(a, b) for a, b in zip(batches, kept))


def test_only_what_later_stages_read_is_distilled() -> None:
    net, batches = odd()
    lorun = lorun_adapt.convert(net, rank=1)
    observer = Observer(net, lorun.stage_map, (batches[0],))
    output = net(batches[0].clone())
    assert observer._final == [len(output["residuals"])]
    assert observer.passed_on == [[0]] * 3
    same_network = Distillation(copy.deepcopy(net), net, observer)
    total, final, psnr = same_network(lambda: same_network.example((batches[0],), 3))
    assert float(total.detach()) == 0 and float(final) == 0 and float(psnr) > 100


class ComplexStage(nn.Module):
    """A denoiser of k-space: complex kernels, on real and imaginary parts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 1, 3, 3, dtype=torch.complex64) / 4)
        self.middle = nn.Parameter(torch.randn(6, 6, 3, 3, dtype=torch.complex64) / 8)
        self.last = nn.Parameter(torch.randn(1, 6, 3, 3, dtype=torch.complex64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x, self.first, padding=1)
        hidden = hidden / (1 + hidden.abs())
        hidden = nn.functional.conv2d(hidden, self.middle, padding=1)
        return x + nn.functional.conv2d(hidden / (1 + hidden.abs()), self.last, padding=1)


def test_complex_networks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(ComplexStage() for _ in range(3))).eval()
    batches = [torch.randn(2, 1, 8, 8, dtype=torch.complex64) for _ in range(4)]
    lorun = lorun_adapt.convert(net, rank=2, stages="*")

    def error() -> float:
        with torch.no_grad():
            return float((lorun(batches[0]) - net(batches[0])).abs().square().mean())

    before = error()
    assert any(p.is_complex() for p in lorun.parameters())
    lorun.recover(net, batches, steps=40)
    assert error() < 0.5 * before


# --- memory and processes ------------------------------------------------------------------------


def test_memory_of_a_training_step() -> None:
    task = load_task(str(shipped("examples/compressive_sensing.py")))
    net = task.build()
    task.load_weights(net, None)
    batch = task.measure(torch.rand(2, 1, 99, 99, generator=torch.Generator().manual_seed(0)))
    lorun = lorun_adapt.convert(net)
    lorun.base.requires_grad_(True)

    def saved(step: Callable[[], Tensor]) -> int:
        return sum(saved_storages(lambda: step().backward()).values())

    truth = net(*batch).detach() + 0.1
    plain = saved(lambda: (net(*batch) - truth).square().mean())
    distillation = Distillation(lorun, net, Observer(net, lorun.stage_map, batch))
    example = distillation.example(batch, 0)
    assert saved(lambda: distillation(lambda: example)[0]) <= 1.01 * plain


LAUNCHED = """
import sys
import torch
from safetensors.torch import save_file
import lorun_adapt
from lorun_adapt.training import distill
from lorun_adapt.training.processes import process_state
from recovery_runs import mean_squared_error, measurements, teacher

distill.relative_error = mean_squared_error
lorun = lorun_adapt.convert(teacher(), rank=2)
lorun.recover(teacher(), measurements(5 + 2 * 5), steps=12)
assert process_state().num_processes == 2
if process_state().is_main_process:
    state = lorun.merge_and_unload().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch) -> None:
    found = launch(LAUNCHED, tmp_path)
    monkeypatch.setattr(distill, "relative_error", mean_squared_error)
    monkeypatch.setattr(recovery, "STEPS_PER_BATCH", 2 * recovery.STEPS_PER_BATCH)
    # Two batches are held out; the stages train by themselves on three, in all processes, for seven steps.
    batches = measurements(5 + 2 * 5)
    pairs = [(torch.cat([a[0], b[0]]), a[1]) for a, b in zip(batches[5::2], batches[6::2])]
    lorun = lorun_adapt.convert(teacher(), rank=2)
    start = lorun.merge_and_unload()
    lorun.recover(teacher(), [*batches[:5], *pairs], steps=12)
    one, two = lorun.merge_and_unload(), teacher()
    two.load_state_dict(found)
    assert distance(one, two) < 0.02 * distance(one, start)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration has no batches"),
        (iter(()), "calibration has no batches"),
        (5, "iterable"),
        (torch.rand(2, 1, 8, 8), "iterable"),
        ([{"y": 1}], "tuple of the forward's arguments"),
        ([()], "an empty tuple"),
        ([torch.rand(4, 1, 8, 8)], "first batch of calibration \\(TypeError"),
        ([(torch.rand(4, 3, 8, 8), torch.rand(1, 3, 8, 8))], "first batch of calibration \\(RuntimeError"),
    ],
)
def test_bad_calibration(calibration, message) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=1)
    before = values(lorun)
    with pytest.raises(LoRunError, match=message):
        lorun.recover(net, calibration, steps=5)
    assert same(values(lorun), before) and not any(p.requires_grad for p in lorun.base.parameters())


def test_bad_arguments() -> None:
    net, batches = teacher(), measurements()
    lorun = lorun_adapt.convert(net, rank=1)
    for options in ({}, {"minutes": 1, "steps": 2}, {"minutes": 0}, {"minutes": -1}, {"steps": 1.5}, {"steps": True}):
        with pytest.raises(LoRunError, match="minutes|steps"):
            lorun.recover(net, batches, **options)
        with pytest.raises(LoRunError, match="minutes|steps"):
            lorun_adapt.convert(net, calibration=batches, **options)
    with pytest.raises(LoRunError, match="need calibration: pass it"):
        lorun_adapt.convert(net, rank=1, minutes=3)
    with pytest.raises(LoRunError, match="teacher"):
        lorun.recover(teacher(stages=4), batches, steps=1)
    with pytest.raises(LoRunError, match="teacher"):
        lorun.recover("net", batches, steps=1)


def test_other_sets_stand_in_the_way(tmp_path) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.save_pretrained(tmp_path / "saved")
    lorun.load_adapter(tmp_path / "saved", "other")
    with pytest.raises(LoRunError, match="recover with only one set"):
        lorun.recover(net, measurements(), steps=1)


def test_an_iterator_that_ends_is_gone_through_again() -> None:
    net = teacher()
    by_list = lorun_adapt.convert(net, rank=1, calibration=measurements(5), steps=12)
    by_iterator = lorun_adapt.convert(net, rank=1, calibration=iter(measurements(5)), steps=12)
    assert same(values(by_list), values(by_iterator))


def test_ground_truth_behind_the_arguments() -> None:
    net = teacher()
    pairs = [(y, mask, 0.3 * y.flip(-1)) for y, mask in measurements()]  # far from what the teacher gives

    def loss(output: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (output - batch[2]).square().mean()

    lorun = lorun_adapt.convert(net, rank=2, calibration=pairs, steps=150, loss=loss)
    by_distance = lorun_adapt.convert(net, rank=2, calibration=pairs, steps=60)
    with torch.no_grad():
        assert loss(lorun(*pairs[0][:2]), pairs[0]) < 0.8 * loss(by_distance(*pairs[0][:2]), pairs[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, also of the original alone
@pytest.mark.parametrize("changes_its_input", [False, True])
def test_stages_in_reentrant_checkpoints_behind_a_frozen_head(changes_its_input: bool) -> None:
    class Checkpointed(ListOfBlocks):
        def __init__(self) -> None:
            super().__init__([Block(Denoiser()) for _ in range(3)])
            self.head = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

        def forward(self, y: Tensor, mask: Tensor) -> Tensor:
            if changes_its_input:
                y.mul_(2)
            x = self.head(y)
            for block in self.blocks:
                x = checkpoint(block, x, y, mask, use_reentrant=True)
            return x

    case = Case(Checkpointed(), [])
    batches = [case.inputs]
    lorun = lorun_adapt.convert(case.net, rank=2)
    before = distance_of(lorun, case)
    assert lorun.recover(case.net, batches, steps=30)
    assert distance_of(lorun, case) < 0.7 * before
    head = lorun.base.head.weight.clone()
    options = {"steps": 5, "loss": lambda output, _: output.square().mean(), "held_out": batches}
    lorun.finetune(batches, "tuned", **options)
    assert torch.equal(lorun.base.head.weight, head)


def distance_of(lorun: lorun_adapt.LoRunModel, case: Case) -> float:
    with torch.no_grad():
        inputs = [tuple(tensor.clone() for tensor in case.inputs) for _ in range(2)]
        return float((lorun(*inputs[0]) - case.net(*inputs[1])).norm())


def test_terms_of_unlike_ranks_recover() -> None:
    """As in a set of adapters that were trained in PEFT, each by itself."""
    torch.manual_seed(0)
    net = ToyUnfoldingNet()
    lorun, larger = (lorun_adapt.convert(net, rank=rank) for rank in (1, 2))
    with tempfile.TemporaryDirectory() as folder:
        larger.base.load_state_dict(lorun.base.state_dict())
        larger.save_pretrained(folder)
        lorun.load_adapter(f"{folder}/adapters/default/stage_00", "default", stage=0)
    ranks = {len(parameter) for name, parameter in lorun.adapters.named_parameters() if name.endswith("lora_A")}
    inputs = (torch.rand(2, 1, 8, 8),)
    before = distance(lorun, net, inputs)
    assert lorun.recover(net, [inputs], steps=30)
    assert len(ranks) == 2 and distance(lorun, net, inputs) < before


def test_a_frozen_set_trains_and_is_frozen_again() -> None:
    torch.manual_seed(0)
    net = ToyUnfoldingNet()
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.set_adapter("default", inference_mode=True)
    before = {name: tensor.clone() for name, tensor in lorun.adapters.named_parameters()}
    assert lorun.recover(net, [torch.rand(2, 1, 8, 8)], steps=20)
    changed = [name for name, tensor in lorun.adapters.named_parameters() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) // 2
    assert not any(parameter.requires_grad for parameter in lorun.parameters())


def test_buffers_that_no_copy_can_be_written_to() -> None:
    class Expanded(ToyUnfoldingNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("window", torch.full((1,), 0.9).expand(1, 1, 8, 8))
            self.register_buffer("transfer", torch.fft.fft2(torch.rand(1, 1, 8, 8)).conj())
            self.register_buffer("mask", None)

        def forward(self, y: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.ones_like(y[:1])
            spectrum = torch.fft.fft2(super().forward(y * self.window * self.mask)) * self.transfer
            return spectrum.conj()  # a view that is conjugated when it is read

    torch.manual_seed(0)
    net, batches = Expanded(), [torch.rand(2, 1, 8, 8)]
    lorun = lorun_adapt.convert(net, budget=0.9, calibration=batches, steps=20)
    assert lorun.recover(net, batches, steps=20)
    assert net.mask is None and "mask" not in net.state_dict()
    assert torch.equal(lorun.base.window, net.window) and torch.equal(lorun.base.transfer, net.transfer)


def test_a_state_for_stages_that_could_run_alone_is_refused(tmp_path) -> None:
    class NoisyWhereLarge(ToyStage):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out = super().forward(x, y)
            return out + 0.5 * torch.rand_like(out) if x.shape[-1] > 8 else out

    torch.manual_seed(0)
    net = ToyUnfoldingNet()
    net.stages = nn.ModuleList(NoisyWhereLarge() for _ in range(3))
    state = tmp_path / "state"
    assert lorun_adapt.convert(net, rank=1).recover(net, [torch.rand(2, 1, 8, 8)], steps=20, resume_from=state)
    with pytest.raises(LoRunError, match="belongs to another run, with another network, config, calibration or seed"):
        lorun_adapt.convert(net, rank=1).recover(net, [torch.rand(2, 1, 16, 16)], steps=40, resume_from=state)
