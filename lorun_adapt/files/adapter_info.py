"""``set_config.json``: what is known of a set of adapters beside its tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..disk.reading import parse_json
from ..errors import LoRunError
from ..network.converted import MOST_QUALITIES, AdapterInfo, Quality
from ..network.noise import Noise, as_noise
from ..util.text import is_short

LONGEST = 1 << 19  # bytes of the file
MOST = 1e12  # of a number


def read_adapter_info(content: bytes, stages: int, where: str) -> AdapterInfo:
    """What a file says.

    Raises:
        LoRunError: anything that has not the right form.
    """
    found = parse_json(content, where)
    wrong = None
    noise: Noise | None = None
    if not isinstance(found, dict) or found.keys() != {"noise_schedule", "measured"}:
        wrong = "keys"
    else:
        try:
            noise = None if found["noise_schedule"] is None else as_noise(found["noise_schedule"], stages)
        except LoRunError:
            wrong = "noise_schedule"
        rows = found["measured"]
        if not isinstance(rows, list) or len(rows) > MOST_QUALITIES or not all(map(_is_measured, rows)):
            wrong = "measured"
    if wrong is not None:
        raise LoRunError(f"expected what is known of a set, found wrong {wrong!r} in {where}: download it again")
    return AdapterInfo(noise, tuple(Quality(**row) for row in found["measured"]))


def _is_measured(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(Quality)}:
        return False
    numbers = {name: value for name, value in row.items() if name not in ("images", "count")}
    return (
        is_short(row["images"])
        and type(row["count"]) is int
        and 0 < row["count"] < 2**31
        and all(
            (n is None and name.endswith("_original")) or (type(n) in (int, float) and -MOST < n < MOST)
            for name, n in numbers.items()
        )
    )
