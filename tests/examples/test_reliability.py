"""Mutated folders and killed processes: a few, and as many as in the README's table."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_some_mutations_and_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import reliability

    outcomes, wrong, _ = reliability.mutate_and_load("norms", 200, seed=0)
    assert wrong == [] and sum(outcomes.values()) == 200
    assert {outcome for _, outcome in outcomes} == {"refused", "loaded"}
    assert {kind for kind, outcome in outcomes if outcome == "refused"} == set(reliability.MUTATIONS)
    killed, wrong = reliability.kill(8, seed=0)
    assert wrong == [] and killed["saves killed"] >= 8 and killed["loads killed"] >= 8


@pytest.mark.slow
def test_mutations_and_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand mutated folders and four hundred kills; the README's table has the same figures."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import reliability

    outcomes, grown, killed, wrong = reliability.measure(mutations=10_000, kills=200, seed=0)
    assert wrong == []
    assert sum(outcomes.values()) >= 10_000 and 0 < grown < reliability.MEMORY
    for kind in reliability.MUTATIONS:
        assert outcomes[kind, "refused"] > 500 and outcomes[kind, "loaded"] > 20 and outcomes[kind, "crashed"] == 0
    assert killed["saves killed"] >= 200 and killed["loads killed"] >= 200
    assert killed["old folder whole"] > 20 and killed["new folder whole"] > 20
