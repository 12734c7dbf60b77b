"""The phases of recovery: what they leave alone, how long they take, and that no run ends below its start."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
from conversions import relative
from dun_zoo import ZOO, Block, Case, Denoiser, ListOfBlocks
from recovery_runs import distance, measurements, same, teacher, values
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.factorise import refit as refitting
from lorun_adapt.network.batches import Batches
from lorun_adapt.network.observe import Observer
from lorun_adapt.network.recording import Recorder
from lorun_adapt.stages.tensors import stage_parameters
from lorun_adapt.training import closed_form, fit, recovery
from lorun_adapt.training.distill import Distillation
from lorun_adapt.training.replay import Replay
from lorun_adapt.training.run import Phase
from lorun_adapt.training.stagewise import TeacherForcing
from lorun_adapt.training.trained import BASE_RATE, trainable_base
from lorun_adapt.training.trainer import Trainer


class Sampling(nn.Module):
    """Measures with a sampling matrix of its own, whose sign counts, and has step sizes beside its stages."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(24, 64) / 8)
        self.steps = nn.Parameter(torch.full((stages,), 0.5))
        self.register_buffer("runs", torch.zeros(()))
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(stages))

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        measured = self.matrix.sign() / 8
        y = images.flatten(1) @ measured.T
        x = y @ measured
        for step, denoiser in zip(self.steps, self.denoisers):
            x = x - step * (x @ measured.T - y) @ measured
            x = denoiser(x.view(images.shape)).flatten(1)
        return x.view(images.shape)


def sampling() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    return Sampling().eval(), [torch.rand(4, 1, 8, 8, generator=generator) for _ in range(4)]


def test_stages_guide_the_first_half_only(monkeypatch) -> None:
    net, batches = sampling()
    seen = []

    class Watched(Distillation):
        def forward(self, draw):
            total, final, psnr = super().forward(draw)
            if torch.is_grad_enabled():
                seen.append((self.guidance, float(total.detach()), float(final)))
            return total, final, psnr

    monkeypatch.setattr(fit, "Distillation", Watched)
    monkeypatch.setattr(recovery, "Distillation", Watched)
    monkeypatch.setattr(recovery, "_phases", lambda forcing, loss: [Phase("end to end")])
    lorun_adapt.convert(net, rank=1).recover(net, batches, steps=10)
    factors, totals, finals = zip(*seen[-10:])
    assert factors == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0], abs=1e-6)
    assert totals[-5:] == finals[-5:] and all(a > b for a, b in zip(totals[:5], finals[:5]))


def test_what_is_outside_the_stages_stays() -> None:
    net, batches = sampling()
    original = copy.deepcopy(net.state_dict())
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.recover(net, batches, steps=20)
    for network in (net, lorun.merge_and_unload()):
        state = network.state_dict()
        assert all(torch.equal(state[name], original[name]) for name in ("matrix", "steps", "runs"))
    assert not torch.equal(
        lorun.merge_and_unload().state_dict()["denoisers.0.body.weight"], original["denoisers.0.body.weight"]
    )


class Variational(nn.Module):
    """Each stage descends the gradient of a learnt energy, which the forward itself computes."""

    def __init__(self) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for denoiser in self.denoisers:
            with torch.enable_grad():
                z = x if x.requires_grad else x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((z - images).square().sum(), z, create_graph=True)
            x = denoiser(x - 0.3 * gradient)
        return x


def test_a_forward_may_have_a_backward_pass_of_its_own() -> None:
    _, batches = sampling()
    net = Variational().eval()
    lorun = lorun_adapt.convert(net, rank=1)
    before = relative(lorun(batches[0]), net(batches[0]))
    assert lorun.recover(net, batches, steps=20)
    assert relative(lorun(batches[0]), net(batches[0])) < 0.9 * before


def test_what_is_named_trains() -> None:
    net, batches = sampling()
    lorun = lorun_adapt.convert(net, rank=1, calibration=batches, steps=20, also="ste*")
    state = lorun.merge_and_unload().state_dict()
    assert torch.equal(state["matrix"], net.matrix) and not torch.equal(state["steps"], net.steps)
    assert not any(p.requires_grad for p in lorun.base.parameters())
    before = values(lorun)
    with pytest.raises(LoRunError, match=r"no parameter outside the stages matches 'phi': choose from \['matrix'"):
        lorun.recover(net, batches, steps=2, also=["phi"])
    assert same(values(lorun), before)


# --- the budget ----------------------------------------------------------------------------------


def test_minutes_are_kept_and_steps_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where factorising again would take much longer than there is time."""
    fitted = []
    fit = refitting.stage_values

    def slow(*arguments):
        fitted.append(arguments)
        time.sleep(0.3)
        return fit(*arguments)

    steps = []
    step = Trainer._step
    monkeypatch.setattr(refitting, "stage_values", slow)
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    net = teacher()
    started = time.monotonic()
    lorun_adapt.convert(net, rank=1, calibration=measurements(), minutes=4 / 60)
    assert time.monotonic() - started < 6
    assert len(fitted) < 8 and len(steps) > 3


class Slow(nn.Module):
    """A network whose forward takes a tenth of a second, or longer."""

    def __init__(self, seconds: float = 0.1) -> None:
        super().__init__()
        self.net = teacher()
        self.seconds = seconds

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.net(y, mask)


@pytest.mark.parametrize("seconds, forward, judged, fits", [(3, 0.3, 1, False), (40, 0.1, 2, True)])
def test_a_slow_start_leaves_out_what_there_is_no_time_for(seconds, forward, judged, fits, monkeypatch) -> None:
    ran, held_out = [], []
    monkeypatch.setattr(recovery, "fit_in_closed_form", lambda *_: ran.append(1))
    monkeypatch.setattr(Trainer, "train", lambda self, stop: held_out.append(len(self.examples)) or True)
    net = Slow(forward).eval()
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing gets better
        lorun_adapt.convert(net, rank=1, calibration=measurements(), minutes=seconds / 60)
    assert held_out == [judged] and bool(ran) is fits
    assert time.monotonic() - started < (3 if fits else seconds + 2)


@pytest.mark.parametrize("numbers, close, forced", [(256, 0.0, False), (256, 1e3, True), (10_000, 0.0, True)])
def test_stages_that_take_turns_do_not_train_alone_if_the_network_is_close(numbers, close, forced, monkeypatch) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=2)
    monkeypatch.setattr("lorun_adapt.training.stagewise.MAX_NUMBERS", numbers)
    monkeypatch.setattr(recovery, "CLOSE", close)
    phases = []
    step = Trainer._step
    monkeypatch.setattr(
        Trainer, "_step", lambda self, phase, *args: phases.append(phase.forcing) or step(self, phase, *args)
    )
    lorun.recover(net, measurements(), steps=30)
    assert len(phases) == 30 and phases[-1] is None
    assert (phases[0] is not None) is forced and (not forced or phases[0].takes_turns is (numbers == 256))


@pytest.mark.parametrize("seconds, trains", [(0.7, False), (0.01, True)])
def test_no_phase_begins_without_time_for_its_first_step(seconds, trains, monkeypatch) -> None:
    """A step with its check takes six forwards, and the check of two batches took so many seconds."""
    judge = Trainer.judge

    def judged(self: Trainer) -> None:
        judge(self)
        self.seconds_per_check = seconds

    monkeypatch.setattr(Trainer, "judge", judged)
    net, student = teacher(), teacher()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert lorun_adapt.fit(student, measurements(), teacher=net, minutes=2 / 60)
    assert same(student.state_dict(), before) is not trains
    assert any("there was no time for a step" in str(warning.message) for warning in caught) is not trains


def test_a_set_without_a_step_is_said_to_be_as_it_began(monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "_first_step", lambda self: 1.0)
    lorun = lorun_adapt.convert(teacher(), rank=1)
    with pytest.warns(UserWarning, match="there was no time for a step: the set is as it began"):
        lorun.finetune(measurements(), "noisy", loss=lambda output, batch: output.square().mean(), minutes=0.05)


def test_nothing_trains_if_the_start_takes_all_the_minutes(monkeypatch) -> None:
    """A second is over before anything can train: nothing changes, and what was begun ends soon."""
    forwards, steps = [], []
    monkeypatch.setattr(Trainer, "_step", lambda self, *_: steps.append(1) or 0.0)
    net = Slow(0.3).eval()
    net.register_forward_hook(lambda *_: forwards.append(1))
    lorun = lorun_adapt.convert(net, rank=1, example_inputs=measurements()[0])
    before = values(lorun)
    forwards.clear()
    with pytest.warns(UserWarning, match="recovery found nothing closer"):
        lorun.recover(net, measurements(), minutes=1 / 60)
    assert not steps and same(values(lorun), before)
    assert len(forwards) <= 5  # of the original: what stages pass on, what runs alone, its output on a batch, the end


def test_few_steps_need_few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = teacher()
    probed = []
    measure = closed_form.sensitivities_of_stages

    def counted(recorder, network, stage_map, recordings, seed):
        def each():
            for calls in recordings:
                probed.append(calls)
                yield calls

        return measure(recorder, network, stage_map, each(), seed)

    monkeypatch.setattr(closed_form, "sensitivities_of_stages", counted)
    for steps, expected in ((1, 2), (60, 6)):
        probed.clear()
        lorun_adapt.convert(net, rank=1).recover(net, measurements(), steps=steps)
        assert len(probed) == expected


def test_the_closed_form_alone_helps_every_shape(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that take the original's inputs come nearer to it, and none goes farther away."""
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    recorder = Recorder(case.net, lorun.stage_map, Observer(case.net, lorun.stage_map, case.inputs), case.inputs)
    if not case.alone:
        before = relative(lorun(*case.inputs), case.net(*case.inputs))
        assert lorun.recover(case.net, [case.inputs], steps=20)
        assert relative(lorun(*case.inputs), case.net(*case.inputs)) < before
        return
    forcing = TeacherForcing(lorun.network, recorder, Replay(Batches([case.inputs]), recorder.record, 0))
    calls = [recorder.record(case.inputs, 0)]
    before = forcing.error(calls)
    monkeypatch.setattr(Trainer, "train", lambda self, stop: True)
    monkeypatch.setattr(Trainer, "improved", True)
    lorun.recover(case.net, [case.inputs], steps=400)
    assert forcing.error(calls) <= before
    if type(case.net).__name__ in ("ListOfBlocks", "ListOfDenoisers"):
        assert forcing.error(calls) < 0.95 * before or before < 1e-6


def test_a_phase_ends_where_it_stops_paying(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages that are exact already have nothing to learn by themselves."""
    seen: list[int] = []
    step = Trainer._step

    def watched(self, phase, *arguments):
        seen.append(self.run.phase)
        return step(self, phase, *arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    net = teacher()
    target = [(y, mask, 0.5 * y) for y, mask in measurements()]

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return (output - batch[2]).square().mean()

    lorun = lorun_adapt.convert(net, rank=10_000)
    lorun.recover(net, target, steps=100, loss=loss)
    assert seen.count(0) < 30 and seen.count(0) + seen.count(1) == 100
    assert "stage by stage" in capsys.readouterr().err


# --- the guard -----------------------------------------------------------------------------------


def test_a_step_that_makes_things_much_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=1)
    step, returned = Trainer._step, []
    back = Trainer._return_to_best

    def disturbed(self, phase, *arguments):
        if self.run.step == 25:
            with torch.no_grad():
                max(self.optimised.parameters, key=Tensor.numel).mul_(1e4)
        return step(self, phase, *arguments)

    def noted(self, phase):
        returned.append((self.run.step, self.run.rate_factor))
        back(self, phase)
        assert all(map(torch.equal, self.optimised.parameters, self.best))

    monkeypatch.setattr(Trainer, "_step", disturbed)
    monkeypatch.setattr(Trainer, "_return_to_best", noted)
    before = distance(lorun, net)
    lorun.recover(net, measurements(), steps=40)
    assert returned == [(26, 1.0)] and distance(lorun, net) < 0.6 * before


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_no_run_ends_below_its_start(steps: int) -> None:
    net = teacher()
    good = lorun_adapt.convert(net, rank=2, calibration=measurements(), steps=150)
    kept = [(y.clone(), mask) for y, mask in measurements(2)]

    @torch.no_grad()
    def error() -> float:  # what a run is judged by
        return sum(distance(good, net, batch) / float(net(*batch).square().mean()) for batch in kept)

    before, weights = error(), values(good)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        good.recover(net, kept, steps=steps)
    assert error() <= before * (1 + 1e-5)
    unchanged = same(values(good), weights)
    assert unchanged == any("nothing closer to the original" in str(item.message) for item in caught)


def test_losses_may_be_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    back = Trainer._return_to_best
    monkeypatch.setattr(Trainer, "_return_to_best", lambda self, phase: (returned.append(1), back(self, phase))[1])
    net = teacher()

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return 1e-3 - (-(output - 0.5 * batch[0]).square().mean()).exp()  # from above zero to below

    lorun = lorun_adapt.convert(net, rank=2)
    batch = measurements(1)[0]
    before = float(loss(lorun(*batch), batch).detach())
    lorun.recover(net, measurements(), steps=60, loss=loss)
    assert float(loss(lorun(*batch), batch).detach()) < before and not returned


def test_the_base_of_a_loop_trains() -> None:
    for name in ("looped", "shared_body"):
        case = ZOO[name]()
        lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
        with trainable_base(lorun.converted(), lorun.network) as trained:
            rates = {id(item.parameter): item.rate for item in trained}
            adapted = {
                id(tensor)
                for group in lorun.stage_map.groups
                for spec in group.tensors
                if spec.name in lorun.stage_map.adapted(group)
                for tensor in stage_parameters(lorun.base, group, spec)
            }
            assert adapted and {rates[tensor] for tensor in adapted} == {BASE_RATE}


# --- divergence ----------------------------------------------------------------------------------


class Growing(nn.Module):
    """A stage that grows what its kernel does not take away exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 3 * self.last(self.second(self.first(x)))


def test_a_conversion_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Growing() for _ in range(6))).eval()
    for block in net:
        block.last.weight.data.mul_(4)
    image = torch.rand(1, 1, 8, 8)
    with pytest.warns(UserWarning, match=r"the conversion of Sequential diverges: its error is [\d.e+,]+ times"):
        lorun_adapt.convert(net, rank=1, stages="*", example_inputs=(image,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorun_adapt.convert(net, rank=1, stages="*")
    monkeypatch.setattr(recovery, "fit_in_closed_form", lambda *_: None)
    lorun = lorun_adapt.convert(net, rank=1, stages="*")
    for parameter in lorun.base.parameters():
        parameter.data.mul_(5)
    with pytest.warns(UserWarning, match=r"diverges: its error is [\d.e+,]+ times .*; train for longer"):
        lorun.recover(net, [image], steps=1)
        lorun_adapt.convert(net, rank=16, stages="*", example_inputs=(image,))


def test_a_network_that_cannot_be_differentiated_says_so() -> None:
    class InPlace(Block):
        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            x.sub_(self.step * mask * (mask * x - y))
            x += 0.1 * self.denoiser(x)
            return x

    class Net(ListOfBlocks):
        def forward(self, y: Tensor, mask: Tensor) -> Tensor:
            return super().forward(y.clone(), mask)

    net, inputs = Net([InPlace(Denoiser()) for _ in range(3)]).eval(), ZOO["list_of_blocks"]().inputs
    with pytest.raises(LoRunError, match="changes a tensor in place that its gradient needs, so it cannot train"):
        lorun_adapt.convert(net, rank=1, calibration=[inputs] * 3, steps=3)
