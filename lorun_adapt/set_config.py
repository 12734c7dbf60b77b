"""``set_config.json``: what is known of a set of adapters beside its tensors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .errors import LoRunError
from .noise import Noise, checked
from .reading import parse_json

LONGEST = 1 << 19  # bytes of the file
MOST_MEASURED = 100
SHORT = 200  # characters of a name
MOST = 1e12  # of a number


@dataclass(frozen=True)
class Measured:
    """How well a set restores some images, and the original network the same ones.

    Attributes:
        images: what they are called, such as the folder's name.
        count: how many they are.
        sigma: noise on the measurements, on a scale of 0 to 255.
        psnr, ssim, psnr_original, ssim_original: means over the images; PSNR in dB.
    """

    images: str
    count: int
    sigma: float
    psnr: float
    ssim: float
    psnr_original: float | None = None
    ssim_original: float | None = None


@dataclass(frozen=True)
class SetConfig:
    """What is known of a set.

    Attributes:
        noise_schedule: the sigma of the measurements that it is for, or one for each stage.
        measured: its quality, where that was measured.
    """

    noise_schedule: Noise | None = None
    measured: tuple[Measured, ...] = ()

    @property
    def sigma(self) -> float | None:
        """The noise of the measurements, where that is one number."""
        return self.noise_schedule if isinstance(self.noise_schedule, float) else None

    def with_measured(self, found: Measured) -> SetConfig:
        """With another measurement, in the place of one of the same images and noise."""
        others = [m for m in self.measured if (m.images, m.sigma) != (found.images, found.sigma)]
        return dataclasses.replace(self, measured=(*others[-MOST_MEASURED + 1 :], found))

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_set_config(content: bytes, stages: int, where: str) -> SetConfig:
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
            noise = None if found["noise_schedule"] is None else checked(found["noise_schedule"], stages)
        except LoRunError:
            wrong = "noise_schedule"
        rows = found["measured"]
        if not isinstance(rows, list) or len(rows) > MOST_MEASURED or not all(map(_is_measured, rows)):
            wrong = "measured"
    if wrong is not None:
        raise LoRunError(f"expected what is known of a set, found wrong {wrong!r} in {where}: download it again")
    return SetConfig(noise, tuple(Measured(**row) for row in found["measured"]))


def _is_measured(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(Measured)}:
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


def is_short(text: object) -> bool:
    """Whether it can stand in a card: some printable words."""
    return isinstance(text, str) and len(text) <= SHORT and text.isprintable()


def shortened(text: str) -> str:
    """Words that can stand in a card."""
    return "".join(c if c.isprintable() else " " for c in text)[:SHORT]
