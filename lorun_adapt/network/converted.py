"""."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from torch import Tensor

from ..stages.stage_map import Site
from .adapter import StageAdapter
from .noise import Noise


@dataclass(frozen=True)
class Card:
    """What the cards say that no tensor tells.

    Attributes:
        license: as the Hub names it, such as ``"apache-2.0"``.
        base_model: a repository of the Hub that holds the original network.
        task: what the network does, in a line.
    """

    license: str | None = None
    base_model: str | None = None
    task: str | None = None


MOST_QUALITIES = 100


@dataclass(frozen=True)
class Quality:
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
class AdapterInfo:
    """What is known of a set.

    Attributes:
        noise_schedule: the sigma of the measurements that it is for, or one for each stage.
        measured: its quality, where that was measured.
    """

    noise_schedule: Noise | None = None
    measured: tuple[Quality, ...] = ()

    @property
    def sigma(self) -> float | None:
        """The noise of the measurements, where that is one number."""
        return self.noise_schedule if isinstance(self.noise_schedule, float) else None

    def with_quality(self, found: Quality) -> AdapterInfo:
        """With another measurement, in the place of one of the same images and noise."""
        others = [m for m in self.measured if (m.images, m.sigma) != (found.images, found.sigma)]
        return dataclasses.replace(self, measured=(*others[-MOST_QUALITIES + 1 :], found))

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class AdapterSet:
    """A set of adapters.

    Attributes:
        adapters: by the name of a group and the site.
        config: PEFT's.
        outside: the set's own parameters outside the stages, by name.
        info: what else is known of it.
    """

    adapters: Mapping[tuple[str, Site], StageAdapter]
    config: LoraConfig
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    info: AdapterInfo = AdapterInfo()
