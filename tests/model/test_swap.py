"""Another set while the network runs: a forward sees the old one or the new one, whole."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from conversions import SET, train_a_bit
from dun_zoo import ZOO, Case

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.model.ready import MAX_READY

THREADS = 8
SWAPS = pytest.mark.parametrize("swaps", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _one_thread_for_each_forward() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_sets(case: Case, tmp_path, **options: object) -> LoRunModel:
    """Sets ``a`` and ``b`` on one base, with outputs that differ; ``a`` runs."""
    lorun = lorun_adapt.convert(case.net, rank=2, **options).eval()
    for name in "ab":
        train_a_bit(lorun, case.inputs)
        lorun.save_pretrained(tmp_path / name)
        lorun.load_adapter(tmp_path / name / SET, name)
    lorun.set_adapter("a", inference_mode=True)
    return lorun


def outputs(lorun: LoRunModel, case: Case, choices) -> list[torch.Tensor]:
    found = []
    for choice in choices:
        lorun.set_adapter(choice, inference_mode=True)
        found.append(lorun(*case.inputs).clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    return found


def run_under_swaps(
    forward: Callable[[], torch.Tensor], swap: Callable[[int], None], expected: list[torch.Tensor], swaps: int
) -> set[int]:
    """Swap while threads run forwards; which of the expected outputs came out. Every output must be one of those."""
    done, seen, wrong = threading.Event(), set(), []

    def work() -> None:
        with torch.no_grad():
            while not done.is_set() and not wrong:
                try:
                    output = forward()
                except BaseException as error:
                    wrong.append(error)
                    return
                found = [i for i, one in enumerate(expected) if torch.equal(output, one)]
                if found:
                    seen.add(found[0])
                else:
                    wrong.append(output)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    workers = [threading.Thread(target=work) for _ in range(THREADS)]
    try:
        for worker in workers:
            worker.start()
        for turn in range(swaps):
            swap(turn)
            if wrong:
                break
    finally:
        done.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]
    return seen


@SWAPS
@pytest.mark.parametrize("name", ["list_of_blocks", "looped"])
def test_forwards_see_one_set(name: str, swaps: int, tmp_path) -> None:
    case = ZOO[name]()
    lorun = two_sets(case, tmp_path, **case.find())
    choices = ["a", "b", {0: "a", 1: "b"}]
    expected = outputs(lorun, case, choices)
    seen = run_under_swaps(
        lambda: lorun(*case.inputs),
        lambda turn: lorun.set_adapter(choices[turn % 3], inference_mode=True),
        expected,
        swaps,
    )
    assert seen == {0, 1, 2}


def test_forwards_do_not_wait_for_each_other(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    expected = outputs(lorun, case, "ab")
    inside, swapped = threading.Barrier(THREADS, timeout=60), threading.Event()
    met: list[int] = []

    def wait(*_: object) -> None:
        """All threads are within a forward at once, and the sets are swapped while they are."""
        if threading.current_thread() is not threading.main_thread():
            met.append(inside.wait())
            swapped.wait(60)

    results: list[torch.Tensor] = []
    with torch.no_grad():
        lorun.set_adapter("a", inference_mode=True)
        lorun.network.blocks[1].register_forward_pre_hook(wait)
        workers = [threading.Thread(target=lambda: results.append(lorun(*case.inputs))) for _ in range(THREADS)]
        for worker in workers:
            worker.start()
        while len(met) < THREADS and not inside.broken:
            swapped.wait(0.01)
        lorun.set_adapter("b", inference_mode=True)
        after = lorun(*case.inputs)
        swapped.set()
        for worker in workers:
            worker.join()
    assert sorted(met) == list(range(THREADS))
    assert torch.equal(after, expected[1])
    assert len(results) == THREADS and all(torch.equal(one, expected[0]) for one in results)


@SWAPS
@pytest.mark.filterwarnings("default")
def test_compiled_forwards_see_one_set_and_are_not_compiled_anew(swaps: int, tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(lorun, backend="eager")  # fullgraph takes one thread's cache for another's
    with torch.no_grad():
        expected = outputs(lorun, case, "ab")
        compiled(*case.inputs)

        def forward() -> torch.Tensor:
            with torch._dynamo.config.patch(error_on_recompile=True):  # what is patched is a thread's own
                return compiled(*case.inputs)

        seen = run_under_swaps(
            forward, lambda turn: lorun.set_adapter("ab"[turn % 2], inference_mode=True), expected, swaps
        )
    assert seen == {0, 1}


def test_a_choice_that_ran_is_ready(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    ready = {}
    for choice in ("a", "b", {0: "a", 2: "a"}):
        lorun.set_adapter(choice)
        ready[str(choice)] = lorun.network
    assert len({id(network) for network in ready.values()}) == 3
    for choice in ("b", {0: "a", 2: "a"}, "a"):
        lorun.set_adapter(choice)
        assert lorun.network is ready[str(choice)]
    assert copy.deepcopy(lorun).network is not lorun.network


def test_not_all_choices_are_kept(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    names = ("a", "b", "default")
    choices = [dict(enumerate(choice)) for choice in itertools.product(names, repeat=4)][: MAX_READY + 5]
    first = lorun(*case.inputs)
    for choice in choices:
        lorun.set_adapter(choice)
    assert len(lorun._running._ready) == MAX_READY
    lorun.set_adapter("a")
    assert torch.equal(lorun(*case.inputs), first)


def test_what_is_ready_follows_what_changes(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    a, b = outputs(lorun, case, "ab")
    lorun.load_adapter(tmp_path / "a" / SET, "b")  # it runs
    assert torch.equal(lorun(*case.inputs), a)
    lorun.set_adapter("a")
    lorun.load_adapter(tmp_path / "b" / SET, "b")  # it does not
    lorun.set_adapter("b")
    assert torch.equal(lorun(*case.inputs), b)
    lorun.double()
    lorun.set_adapter("a")
    inputs = [value.double() for value in case.inputs]
    torch.testing.assert_close(lorun(*inputs).float(), a)
    lorun.delete_adapter("b")
    lorun.load_adapter(tmp_path / "a" / SET, "b")
    lorun.set_adapter("b")
    torch.testing.assert_close(lorun(*inputs).float(), a)


def test_a_swap_keeps_modes_of_modules(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    lorun.set_adapter("b")
    lorun.train()
    lorun.network.blocks[0].eval()
    lorun.set_adapter("a")
    assert lorun.network.blocks[1].training and not lorun.network.blocks[0].training
    lorun.eval()
    lorun.set_adapter("b")
    assert not any(module.training for module in lorun.network.modules())


def test_inference_mode_freezes(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    assert not any(p.requires_grad for p in lorun.parameters())
    lorun.load_adapter(tmp_path / "b" / SET, "a")  # the one that runs stays frozen
    assert not any(p.requires_grad for p in lorun.parameters())
    lorun.set_adapter("b")
    trains = {name for name, p in lorun.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("adapters.b.") for name in trains)


def test_a_set_that_lacks_a_stage_does_not_replace_the_one_that_runs(tmp_path) -> None:
    case = ZOO["list_of_blocks"]()
    lorun = two_sets(case, tmp_path)
    before = lorun(*case.inputs)
    lorun.load_adapter(tmp_path / "b" / SET, "one", stage=2)
    lorun.set_adapter({2: "one"})
    mixed = lorun(*case.inputs)
    with pytest.raises(LoRunError, match="'one' has no adapter for stage 1"):
        lorun.set_adapter({1: "one"})
    assert torch.equal(lorun(*case.inputs), mixed) and not torch.equal(mixed, before)
