"""A converted network is an nn.Module like any other, and its base stays one storage."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from conversions import train_a_bit
from dun_zoo import ZOO, Case, HeadBodyTail, Looped
from peft import LoraConfig
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.terms.lowrank import LowRank


def base_pointers(lorun: LoRunModel, name: str = "denoiser.body.weight") -> set[int]:
    blocks = [lorun.network.get_submodule(site.module) for site in lorun.stage_map.groups[0].sites]
    path, _, attribute = name.rpartition(".")
    return {block.get_submodule(path).get_parameter(f"lorun_base_{attribute}").data_ptr() for block in blocks}


def test_state_dict_round_trip(blocks: Case, lorun: LoRunModel) -> None:
    buffer = io.BytesIO()
    torch.save(lorun.state_dict(), buffer)
    assert not any(name.startswith("network.") for name in lorun.state_dict())
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for assign in (False, True):
        other = lorun_adapt.convert(blocks.net, rank=2)
        assert not torch.equal(other(*blocks.inputs), lorun(*blocks.inputs))
        holder = nn.ModuleDict({"network": other})  # as a part of something larger, under a tricky name
        result = holder.load_state_dict({f"network.{k}": v for k, v in state.items()}, strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(other(*blocks.inputs), lorun(*blocks.inputs))
        assert len(base_pointers(other)) == 1


def test_load_state_dict_is_strict(lorun: LoRunModel) -> None:
    state = lorun.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        lorun.load_state_dict(state)


def test_overwriting_conversion_keeps_sharing(blocks: Case, lorun: LoRunModel) -> None:
    expected = lorun(*blocks.inputs)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        lorun.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert len(base_pointers(lorun)) == 1
    output = lorun(*(x.double() for x in blocks.inputs))
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), expected)


def test_buffers_follow_to(lorun: LoRunModel) -> None:
    case = ZOO["list_of_dncnns"]()
    lorun = lorun_adapt.convert(case.net, rank=2).double()
    assert {tensor.dtype for tensor in (*lorun.network.parameters(), *lorun.network.buffers())} == {
        torch.float64,
        torch.int64,
    }
    lorun.train()
    lorun(*(x.double() for x in case.inputs))
    adapter = lorun.adapters["default"]["stage_00"]["denoiser"]
    layer = lorun.network.denoisers[0].layers[3]
    assert layer.running_mean is dict(adapter.named_buffers())["layers/3/running_mean"]


@pytest.mark.parametrize("name", ["list_of_blocks", "looped", "list_of_raw_kernels"])
def test_functional_calls_leave_no_trace(name: str) -> None:
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, rank=2, **case.find())
    train_a_bit(lorun, case.inputs)
    before, expected = dict(lorun.named_parameters()), lorun(*case.inputs)
    larger = {name: 1.1 * parameter.detach() for name, parameter in before.items()}
    assert not torch.equal(torch.func.functional_call(lorun, larger, case.inputs), expected)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(lorun, p, case.inputs).square().sum())(larger)
    assert any(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)
    assert all(parameter is before[name] for name, parameter in lorun.named_parameters())
    assert torch.equal(lorun(*case.inputs), expected)
    lorun(*case.inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in lorun.adapters.parameters() if parameter.requires_grad)


def test_through_the_meta_device(blocks: Case) -> None:
    lorun = lorun_adapt.convert(blocks.net, LoraConfig(r=2, lora_alpha=1))
    train_a_bit(lorun, blocks.inputs)
    state, expected = {name: tensor.clone() for name, tensor in lorun.state_dict().items()}, lorun(*blocks.inputs)
    lorun.to("meta")
    assert lorun(*(x.to("meta") for x in blocks.inputs)).shape == expected.shape
    lorun.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(lorun(*blocks.inputs), expected)
    third = lorun_adapt.convert(blocks.net, LoraConfig(r=3, lora_alpha=1))
    expected = third(*blocks.inputs)
    assert (third.half().float()(*blocks.inputs) - expected).abs().max() < 1e-3
    assert {float(m.factor) for m in third.modules() if isinstance(m, LowRank)} == {float(torch.tensor(1 / 3))}


def test_adapters_in_float32_on_a_base_of_16_bits(blocks: Case, lorun: LoRunModel) -> None:
    expected = lorun(*blocks.inputs)
    lorun.to(torch.bfloat16)
    for name, parameter in lorun.adapters.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    output = lorun(*(x.bfloat16() for x in blocks.inputs))
    assert output.dtype == torch.bfloat16 and (output.float() - expected).abs().max() < 0.05


def test_half_and_autocast(blocks: Case, lorun: LoRunModel) -> None:
    expected = lorun(*blocks.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (lorun(*blocks.inputs) - expected).abs().max() < 0.05
        assert lorun.network.blocks[0].denoiser.body.weight.dtype == torch.float32
    halved = copy.deepcopy(lorun).to(torch.bfloat16)
    assert (halved(*(x.bfloat16() for x in blocks.inputs)).float() - expected).abs().max() < 0.05
    assert torch.equal(lorun(*blocks.inputs), expected)


def test_deepcopy_is_apart(blocks: Case, lorun: LoRunModel) -> None:
    expected = lorun(*blocks.inputs)
    twin = copy.deepcopy(lorun)
    assert torch.equal(twin(*blocks.inputs), expected)
    assert base_pointers(twin) != base_pointers(lorun) and len(base_pointers(twin)) == 1
    train_a_bit(twin, blocks.inputs)
    twin.set_adapter("default")
    assert not torch.equal(twin(*blocks.inputs), expected)
    assert torch.equal(lorun(*blocks.inputs), expected)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, lambda lorun: torch.save(lorun, io.BytesIO())])
def test_pickling_names_save_pretrained(lorun: LoRunModel, way) -> None:
    with pytest.raises(LoRunError, match="save_pretrained"):
        way(lorun)


def test_data_parallel(blocks: Case, lorun: LoRunModel) -> None:
    assert torch.equal(nn.DataParallel(lorun)(*blocks.inputs), lorun(*blocks.inputs))
    # No GPU here: replicas are made as nn.parallel.replicate makes them, with plain tensors for parameters.
    replicas = {module: module._replicate_for_data_parallel() for module in lorun.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
    assert torch.equal(replicas[lorun](*blocks.inputs), lorun(*blocks.inputs))


def test_only_adapters_train(blocks: Case, lorun: LoRunModel, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: p.clone() for name, p in lorun.base.named_parameters()}
    train_a_bit(lorun, blocks.inputs)
    assert all(torch.equal(p, before[name]) for name, p in lorun.base.named_parameters())
    assert all(p.grad is not None for p in lorun.parameters() if p.requires_grad)
    trainable = sum(p.numel() for p in lorun.adapters.parameters())
    assert lorun.num_parameters() == trainable + sum(p.numel() for p in blocks.net.blocks[0].parameters())
    lorun.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {lorun.num_parameters():,}" in capsys.readouterr().out


def test_train_and_eval_reach_the_network_and_survive_a_swap(lorun: LoRunModel) -> None:
    lorun.train()
    assert lorun.network.blocks[0].training
    lorun.network.blocks[0].eval()
    lorun.set_adapter("default")
    assert lorun.network.training and not lorun.network.blocks[0].training


def test_buffers_that_change_are_part_of_the_fingerprint(blocks: Case) -> None:
    blocks.net.register_buffer("running", torch.zeros(2))
    lorun = copy.deepcopy(lorun_adapt.convert(blocks.net, rank=2))
    before = lorun.fingerprint
    assert lorun.fingerprint == before
    lorun.base.running.add_(1)
    changed = lorun.fingerprint
    assert changed != before
    lorun.base.running.sub_(1)
    assert lorun.fingerprint == before
    with torch.no_grad():
        lorun.base.blocks[0].denoiser.body.weight.mul_(2)
    trained = lorun.fingerprint
    assert trained != before
    assert lorun.double().fingerprint == trained == lorun.half().fingerprint
    lorun.base.running.add_(1)
    assert lorun.fingerprint != trained


@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels", "looped", "shared_body", "attention"])
def test_compile(name: str) -> None:
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, rank=2, **case.find()).eval()
    train_a_bit(lorun, case.inputs)
    expected = lorun(*case.inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lorun, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case.inputs), expected)
    torch.testing.assert_close(compiled(*case.inputs), expected)  # calls count from zero again
    with torch._dynamo.config.patch(error_on_recompile=True):
        lorun.set_adapter("default")
        torch.testing.assert_close(compiled(*case.inputs), expected)
    torch.testing.assert_close(lorun(*case.inputs), expected)


# --- modules that are called in a loop -----------------------------------------------------------


@pytest.fixture
def loop() -> tuple[LoRunModel, tuple[torch.Tensor, ...]]:
    case = ZOO["looped"]()
    lorun = lorun_adapt.convert(case.net, rank=2, calls={"p": 4})
    train_a_bit(lorun, case.inputs)
    return lorun, case.inputs


def unrolled(lorun: LoRunModel, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the loop should compute, with the copies named one by one."""
    x = y
    for stage in lorun.network.p.lorun_calls:
        x = stage(x - 0.5 * mask * (mask * x - y))
    return x


def test_each_call_has_its_adapter(loop) -> None:
    lorun, inputs = loop
    assert torch.equal(lorun(*inputs), unrolled(lorun, *inputs))
    assert not torch.equal(lorun(*inputs), lorun.base(*inputs))


def test_calls_count_anew_after_an_exception(loop) -> None:
    lorun, inputs = loop
    expected = lorun(*inputs)

    def fail(*_):
        raise KeyError("on purpose")

    hook = lorun.network.p.lorun_calls[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        lorun(*inputs)
    hook.remove()
    assert torch.equal(lorun(*inputs), expected)


def test_nested_forwards_count_apart(loop) -> None:
    lorun, inputs = loop
    expected = lorun(*inputs)
    nested = []

    def run_inside(*_):
        if len(nested) < 1:
            nested.append(None)
            nested[0] = lorun(*inputs)

    lorun.network.p.register_forward_pre_hook(run_inside)
    assert torch.equal(lorun(*inputs), expected)
    assert torch.equal(nested[0], expected)


def test_threads_count_apart(loop) -> None:
    lorun, inputs = loop
    expected = lorun(*inputs).detach()
    barrier = threading.Barrier(4)
    outputs: list[torch.Tensor] = []

    def keep_step(*_) -> None:
        barrier.wait(60)

    lorun.network.p.register_forward_pre_hook(keep_step)

    def run() -> None:
        with torch.no_grad():
            outputs.append(lorun(*inputs))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4 and all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["iteration", "denoiser", "two iterations"])
def test_recomputation_finds_its_call(reentrant: bool, part: str) -> None:
    from torch.utils.checkpoint import checkpoint

    class Recomputed(Looped):
        def forward(self, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if not self.recompute:
                return super_forward(self, y, mask)
            x = y

            def two(x: torch.Tensor) -> torch.Tensor:
                return self.iterate(self.iterate(x, y, mask), y, mask)

            for k in range(2 if part == "two iterations" else 4):
                if part == "iteration":
                    x = checkpoint(self.iterate, x, y, mask, use_reentrant=reentrant)
                elif part == "denoiser":
                    x = x - 0.5 * mask * (mask * x - y)
                    # Not every call is recomputed.
                    x = self.p(x) if k == 1 else checkpoint(self.p, x, use_reentrant=reentrant)
                else:
                    x = checkpoint(two, x, use_reentrant=reentrant)
            return x

    super_forward = Looped.__mro__[0].forward
    net = Recomputed()
    net.recompute = None
    y, mask = ZOO["looped"]().inputs
    lorun = lorun_adapt.convert(net, rank=2, calls={"p": 4})
    train_a_bit(lorun, (y, mask))

    gradients = []
    for recompute in (None, True):
        lorun.network.recompute = recompute
        leaf = y.clone().requires_grad_()
        lorun.zero_grad()
        output = lorun(leaf, mask)
        lorun(leaf, mask)  # another forward before the backward must not shift the count
        output.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in lorun.adapters.parameters())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


def test_forwards_without_backward_leave_nothing(loop) -> None:
    lorun, inputs = loop
    output = lorun(*inputs)
    kept = torch.multiprocessing.reductions.StorageWeakRef(output.untyped_storage())
    hidden = []
    lorun.network.p.lorun_calls[1].register_forward_hook(
        lambda _, __, out: hidden.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
    )
    other = lorun(*inputs)
    del output, other
    gc.collect()
    assert kept.expired() and len(hidden) == 1 and hidden[0].expired()


def test_second_derivatives_through_a_loop(loop) -> None:
    lorun, (y, mask) = loop
    y = y.clone().requires_grad_()
    gradients = []
    for run in (lambda y: lorun(y, mask), lambda y: unrolled(lorun, y, mask)):
        (first,) = torch.autograd.grad(run(y).square().sum(), y, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), y)[0])
    torch.testing.assert_close(*gradients)


def test_in_place_changes_are_still_caught(loop) -> None:
    lorun, inputs = loop
    kept = []
    lorun.network.p.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    loss = lorun(*inputs).sum()
    with torch.no_grad():
        kept[1].add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_too_many_calls_are_an_error(loop) -> None:
    lorun, inputs = loop
    for network in (lorun.base, lorun.network):
        network.loops = 5
    with pytest.raises(LoRunError, match="expected 4 calls of 'p'"):
        lorun(*inputs)


def test_called_from_outside_is_an_error(loop) -> None:
    lorun, inputs = loop
    fresh: list[Exception] = []

    def run() -> None:  # a thread that has never run backward
        try:
            lorun.network.p(inputs[0])
        except LoRunError as error:
            fresh.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert fresh and "call the LoRunModel" in str(fresh[0])
    assert torch.equal(lorun.network(*inputs), lorun(*inputs))  # the whole network counts by itself


def test_trained_loops_do_not_go_back(loop) -> None:
    lorun, _ = loop
    with pytest.raises(LoRunError, match="keep the LoRunModel"):
        lorun.merge_and_unload()


def test_untrained_loops_do() -> None:
    case = ZOO["many_parents"]()
    lorun = lorun_adapt.convert(case.net, rank=2)
    assert torch.equal(lorun.merge_and_unload()(*case.inputs), case.net(*case.inputs))


def test_a_shared_body_is_found_with_calls() -> None:
    torch.manual_seed(0)
    found = lorun_adapt.find_stages(HeadBodyTail(loops=3), calls={"body": 3})
    assert [str(site) for site in found.groups[0].sites] == [
        "head",
        "body (call 0)",
        "body (call 1)",
        "body (call 2)",
        "tail",
    ]
