"""The example that compares ways to make a network smaller."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tasks import COLOUR_TASK

from lorun_adapt.task.task import load_task


@pytest.mark.slow
def test_ways_are_compared_at_equal_bytes(tmp_path, images, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import compare_methods

    # So wide that a file's header, which grows where a stage's bias is not bit for bit the base's plus a
    # difference, is no matter.
    task_file, weights = tmp_path / "wide.py", tmp_path / "wide.safetensors"
    task_file.write_text(COLOUR_TASK.replace("Denoiser()", "Denoiser(32)"))
    save_file(load_task(str(task_file)).build().state_dict(), weights)
    given = [task_file, images, "--judge", images, "--weights", weights, "--minutes", "0.02", "--budgets", "0.6"]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, given)])
    compare_methods.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    sizes = [int(row[1].replace(",", "")) for row in rows]
    assert len(rows) == 8 and "PEFT" in rows[-1][0]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02) and max(sizes) <= 1.01 * sizes[0]
    assert all(abs(float(row[3])) < 1 for row in rows[:3])
