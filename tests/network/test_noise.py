"""Noise levels: the sets around one, and what a sum of sets stands for."""

from __future__ import annotations

import pytest

from lorun_adapt.network.noise import between, mixed


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (10, {"a": 1}),
        (20, {"a": 0.75, "b": 0.25}),
        (49, {"a": 0.025, "b": 0.975}),
        (50, {"b": 1}),
        (60, {"b": 0.9, "c": 0.1}),
        (5, {"a": 1}),
        (500, {"c": 1}),
    ],
)
def test_between(sigma: float, expected: dict[str, float]) -> None:
    assert between(sigma, {"c": 150, "a": 10, "b": 50}) == pytest.approx(expected)


def test_what_a_sum_stands_for() -> None:
    assert mixed([10.0, 50.0], [0.25, 0.75]) == 40
    assert mixed([(0.0, 10.0), (10.0, 30.0)], [0.5, 0.5]) == (5, 20)
    for noises, weights in (
        ([10.0, None], [0.5, 0.5]),
        ([10.0, 50.0], [1, 1]),
        ([10.0, 50.0], [2, -1]),
        ([1.0, (1.0, 2.0)], [0.5, 0.5]),
    ):
        assert mixed(noises, weights) is None
