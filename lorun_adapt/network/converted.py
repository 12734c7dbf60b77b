"""A converted network as plain data: what files, the Hub, factorisation, training and reports take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import StageMap
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors
from .adapter import StageAdapter
from .noise import Noise

MAX_QUALITIES = 100  # kept for a set

Residuals = Mapping[str, Mapping[str, list[tuple[float, float]]]]


@dataclass(frozen=True)
class Card:
    """What the model cards say that no tensor tells.

    Attributes:
        license: as the Hub names it, such as ``"apache-2.0"``.
        base_model: a repository of the Hub that holds the original network.
        task: what the network does, in one line.

    >>> import lorun_adapt
    >>> lorun_adapt.Card(license="mit", task="Compressive sensing at 25 %").license
    'mit'
    """

    license: str | None = None
    base_model: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Quality:
    """How well an adapter set restores some images, and how well the original network does.

    Attributes:
        images: what the images are called, such as their folder's name.
        count: how many there are.
        sigma: noise on the measurements, on a scale of 0 to 255.
        psnr, ssim, psnr_original, ssim_original: means over the images; PSNR in dB.

    >>> import lorun_adapt
    >>> lorun_adapt.Quality("bsd68", count=68, sigma=0.0, psnr=29.25, ssim=0.85).psnr
    29.25
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
    """What is known of an adapter set beside its tensors.

    Attributes:
        sigma: the noise of the measurements that the set is for, on a scale of 0 to 255.
        noise_schedule: instead of it, one sigma for each stage.
        quality: what was measured.

    >>> import lorun_adapt
    >>> lorun_adapt.AdapterInfo(sigma=25.0).noise
    25.0
    """

    sigma: float | None = None
    noise_schedule: tuple[float, ...] | None = None
    quality: tuple[Quality, ...] = ()

    @property
    def noise(self) -> Noise | None:
        """One sigma, or one for each stage; None where it is not known."""
        return self.sigma if self.noise_schedule is None else self.noise_schedule

    def with_noise(self, noise: Noise | None) -> AdapterInfo:
        """The same for another noise."""
        one = noise if isinstance(noise, float) else None
        return dataclasses.replace(self, sigma=one, noise_schedule=None if isinstance(noise, float) else noise)

    def with_quality(self, quality: Quality) -> AdapterInfo:
        """The same with another measurement, which replaces one of the same images and noise."""
        others = [item for item in self.quality if (item.images, item.sigma) != (quality.images, quality.sigma)]
        return dataclasses.replace(self, quality=(*others[-MAX_QUALITIES + 1 :], quality))


@dataclass(frozen=True)
class AdapterSet:
    """One adapter per stage.

    Attributes:
        adapters: by stage, and by the name of the group (a stage has one denoiser of each group).
        config: PEFT's.
        outside: the set's own parameters outside the stages, by name.
        info: what else is known of it.
    """

    adapters: Mapping[int, Mapping[str, StageAdapter]]
    config: LoraConfig
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    info: AdapterInfo = AdapterInfo()


Choice = Mapping[int, Mapping[str, StageAdapter]]  # for each stage, the adapters that it runs with, by group


@dataclass(frozen=True)
class Converted:
    """A converted network: a base, sets of adapters, and which of them run.

    Attributes:
        base: a network of the original class whose stages share their tensors.
        stage_map: where the stages are.
        sets: the adapter sets by name.
        active: the set that each stage runs with.
        residuals: by group and tensor, for each stage: the norm that the conversion lost, and the tensor's norm.
        trainable_names: parameters that the network's authors train.
        card: what the model card says beside the figures.
        known_fingerprint: of the base, where it has been worked out.

    Raises:
        LoRunError: a stage that runs with a set which is not there or lacks the stage.
    """

    base: nn.Module
    stage_map: StageMap
    sets: Mapping[str, AdapterSet]
    active: Mapping[int, str]
    residuals: Residuals
    trainable_names: frozenset[str]
    card: Card = Card()
    known_fingerprint: str | None = None

    def __post_init__(self) -> None:
        for stage in range(len(self.stage_map)):
            name = self.active.get(stage)
            if name is None or name not in self.sets or stage not in self.sets[name].adapters:
                raise LoRunError(f"stage {stage} has no adapter in the set {name!r}: set another one for this stage")

    @property
    def fingerprint(self) -> str:
        """What names the base in files."""
        return self.known_fingerprint or fingerprint_of(distinct_tensors(self.base))

    @property
    def choice(self) -> Choice:
        """The adapters that run."""
        return {stage: self.sets[name].adapters[stage] for stage, name in sorted(self.active.items())}

    @property
    def outside(self) -> Mapping[str, Tensor]:
        """The parameters outside the stages that replace the base's: those of a set that runs in every stage."""
        names = set(self.active.values())
        return self.sets[names.pop()].outside if len(names) == 1 else {}
