"""``set_config.json``: the noise level and the measured quality of an adapter set."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from ..disk.reading import parse_json
from ..errors import LoRunError
from ..network.converted import MAX_QUALITIES, AdapterInfo, Quality
from ..network.noise import as_noise
from ..util.numbers import is_number
from ..util.text import is_short

MAX_INFO_BYTES = 1 << 19  # bytes
MAX_VALUE = 1e12
MAX_FURTHER = 16  # metrics beside PSNR and SSIM
METRIC_NAME = re.compile("(?!(psnr|ssim)$)[a-z][a-z0-9_]{0,31}")
FURTHER = {"further", "further_original"}


def adapter_info_text(info: AdapterInfo) -> str:
    """Return the text of the file."""
    quality = [_row(item) for item in info.quality]
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
    return _is_quality(_row(quality))


def _row(quality: Quality) -> dict[str, Any]:
    """A measurement as the file has it: without further metrics where there are none, as files were written before."""
    row = {field.name: getattr(quality, field.name) for field in dataclasses.fields(quality)}
    further = {name: dict(row.pop(name)) for name in sorted(FURTHER)}
    return row | {name: figures for name, figures in further.items() if figures}


def _is_quality(row: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Quality)}
    if not isinstance(row, dict) or not names - FURTHER <= row.keys() <= names:
        return False
    numbers = {name: value for name, value in row.items() if name not in {"images", "count"} | FURTHER}
    return (
        is_short(row["images"])
        and type(row["count"]) is int
        and 0 < row["count"] < 2**31
        and all((n is None and name.endswith("_original")) or _is_figure(n) for name, n in numbers.items())
        and all(_are_further(row[name]) for name in FURTHER & row.keys())
    )


def _are_further(figures: Any) -> bool:
    return (
        isinstance(figures, dict)
        and len(figures) <= MAX_FURTHER
        and all(isinstance(name, str) and METRIC_NAME.fullmatch(name) for name in figures)
        and all(map(_is_figure, figures.values()))
    )


def _is_figure(value: Any) -> bool:
    return is_number(value) and -MAX_VALUE < value < MAX_VALUE
