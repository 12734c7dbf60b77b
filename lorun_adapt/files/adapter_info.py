"""``set_config.json``: the noise level and the measured quality of an adapter set."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..disk.reading import parse_json
from ..errors import LoRunError
from ..network.converted import MAX_QUALITIES, AdapterInfo, Quality
from ..network.noise import as_noise
from ..util.numbers import is_number
from ..util.text import is_short

MAX_INFO_BYTES = 1 << 19  # bytes
MAX_VALUE = 1e12


def adapter_info_text(info: AdapterInfo) -> str:
    """Return the text of the file."""
    quality = [dataclasses.asdict(item) for item in info.quality]
    return json.dumps({"noise_schedule": info.noise, "measured": quality}, indent=2) + "\n"


def read_adapter_info(content: bytes, num_stages: int, where: str) -> AdapterInfo:
    """Read the file.

    Args:
        content: the bytes of the file.
        num_stages: the number of stages of the network.
        where: the file's name, for error messages.

    Raises:
        LoRunError: invalid content.
    """
    entry = parse_json(content, where)
    info, wrong = AdapterInfo(), None
    if not isinstance(entry, dict) or entry.keys() != {"noise_schedule", "measured"}:
        wrong = "keys"
    else:
        try:
            noise = entry["noise_schedule"]
            info = info.with_noise(None if noise is None else as_noise(noise, num_stages))
        except LoRunError:
            wrong = "noise_schedule"
        rows = entry["measured"]
        if not isinstance(rows, list) or len(rows) > MAX_QUALITIES or not all(map(_is_quality, rows)):
            wrong = "measured"
    if wrong is not None:
        raise LoRunError(f"{where} has an invalid {wrong!r}: download it again")
    return dataclasses.replace(info, quality=tuple(Quality(**row) for row in entry["measured"]))


def is_storable(quality: Quality) -> bool:
    """Whether :func:`read_adapter_info` could read ``quality`` back."""
    return _is_quality(dataclasses.asdict(quality))


def _is_quality(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(Quality)}:
        return False
    numbers = {name: value for name, value in row.items() if name not in ("images", "count")}
    return (
        is_short(row["images"])
        and type(row["count"]) is int
        and 0 < row["count"] < 2**31
        and all(
            (n is None and name.endswith("_original")) or (is_number(n) and -MAX_VALUE < n < MAX_VALUE)
            for name, n in numbers.items()
        )
    )
