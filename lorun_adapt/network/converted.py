"""A converted network as plain data, which files, the Hub, factorisation, training and reports exchange."""

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
from .adapter import StageAdapter, terms_of
from .noise import Noise

MAX_QUALITIES = 100  # per set

Residuals = Mapping[str, Mapping[str, list[tuple[float, float]]]]


@dataclass(frozen=True)
class Card:
    """The text of a model card that cannot be computed from the network.

    Attributes:
        license: the Hub's identifier of the licence, such as ``"apache-2.0"``.
        base_model: the Hub repository of the original network, as ``user/name``.
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
    """The measured quality of an adapter set on some images, beside that of the original network.

    Attributes:
        images: a name for the images, such as the name of their folder.
        count: the number of images.
        sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255.
        psnr: mean PSNR over the images, in dB.
        ssim: mean SSIM over the images, at most 1.
        psnr_original: the same for the original network; None if not measured.
        ssim_original: the same for the original network; None if not measured.
        further: the means of other metrics, by name, such as ``{"sam": 0.08}``.
        further_original: the same for the original network.

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
    further: Mapping[str, float] = field(default_factory=dict, hash=False)
    further_original: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class AdapterInfo:
    """The noise level that an adapter set is for, and its measured quality.

    Attributes:
        sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255; None if unknown.
        noise_schedule: instead of ``sigma``, one standard deviation for each stage.
        quality: the measurements, oldest first.

    >>> import lorun_adapt
    >>> lorun_adapt.AdapterInfo(sigma=25.0).noise
    25.0
    """

    sigma: float | None = None
    noise_schedule: tuple[float, ...] | None = None
    quality: tuple[Quality, ...] = ()

    @property
    def noise(self) -> Noise | None:
        """The sigma, or the tuple of sigmas of the stages; None if unknown."""
        return self.sigma if self.noise_schedule is None else self.noise_schedule

    def with_noise(self, noise: Noise | None) -> AdapterInfo:
        """Return a copy for another noise level."""
        one = noise if isinstance(noise, float) else None
        return dataclasses.replace(self, sigma=one, noise_schedule=None if isinstance(noise, float) else noise)

    def with_quality(self, quality: Quality) -> AdapterInfo:
        """Return a copy with one more measurement, which replaces one on the same images at the same sigma.

        Further metrics of the replaced measurement are kept unless ``quality`` has them too.
        """
        key = quality.images, quality.sigma
        others = [item for item in self.quality if (item.images, item.sigma) != key]
        for item in [item for item in self.quality if (item.images, item.sigma) == key]:
            quality = dataclasses.replace(
                quality,
                further={**item.further, **quality.further},
                further_original={**item.further_original, **quality.further_original},
            )
        return dataclasses.replace(self, quality=(*others[-MAX_QUALITIES + 1 :], quality))


@dataclass(frozen=True)
class AdapterSet:
    """A set of adapters, one for each denoiser of each stage.

    Attributes:
        adapters: by stage, then by group (a stage has one denoiser of each group).
        config: PEFT's config.
        outside: the parameters outside the stages that the set replaces, by name.
        info: the set's noise level and measured quality.
    """

    adapters: Mapping[int, Mapping[str, StageAdapter]]
    config: LoraConfig
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    info: AdapterInfo = AdapterInfo()

    def has_tensors_of(self, other: AdapterSet) -> bool:
        """Whether both have the same adapters, and the same parameters outside the stages, as objects."""
        same = all(other.outside.get(name) is tensor for name, tensor in self.outside.items())
        return self.adapters == other.adapters and self.outside.keys() == other.outside.keys() and same


def ranks_in(*sets: AdapterSet) -> dict[str, dict[str, int]]:
    """Return the ranks of terms by group and tensor: of each group, those of the first set and stage that has it."""
    ranks: dict[str, dict[str, int]] = {}
    for held in sets:
        for adapters in held.adapters.values():
            for group, adapter in adapters.items():
                ranks.setdefault(group, {name: term.rank for name, term in terms_of(adapter).items()})
    return ranks


Choice = Mapping[int, Mapping[str, StageAdapter]]  # for each stage, its active adapters by group


@dataclass(frozen=True)
class Converted:
    """A converted network: a base, adapter sets, and the active set of each stage.

    Attributes:
        base: a network of the original class whose stages share their tensors.
        stage_map: the positions of the stages.
        sets: the adapter sets by name.
        active: the active set of each stage.
        residuals: by group and tensor, a pair for each stage: the norm of the difference between the original tensor
            and its replacement at conversion, and the norm of the original tensor.
        trainable_names: names of the parameters that the original network trains.
        card: the text of the model card.
        ties: names of parameters that the original network ties, those of one parameter together.
        known_fingerprint: the fingerprint of the base, if it has been computed.
        recovered: whether recovery has trained it since it was converted or loaded.

    Raises:
        LoRunError: the active set of a stage is missing or has no adapter for the stage.
    """

    base: nn.Module
    stage_map: StageMap
    sets: Mapping[str, AdapterSet]
    active: Mapping[int, str]
    residuals: Residuals
    trainable_names: frozenset[str]
    card: Card = Card()
    ties: tuple[tuple[str, ...], ...] = ()
    known_fingerprint: str | None = None
    recovered: bool = False

    def __post_init__(self) -> None:
        for stage in range(len(self.stage_map)):
            name = self.active.get(stage)
            if name is None or name not in self.sets or stage not in self.sets[name].adapters:
                raise LoRunError(
                    f"stage {stage} has no adapter in the set {name!r}: activate another set in this stage"
                )

    @property
    def fingerprint(self) -> str:
        """The hash that identifies the base in files."""
        return self.known_fingerprint or fingerprint_of(distinct_tensors(self.base))

    @property
    def choice(self) -> Choice:
        """The active adapters."""
        return {stage: self.sets[name].adapters[stage] for stage, name in sorted(self.active.items())}

    @property
    def outside(self) -> Mapping[str, Tensor]:
        """The parameters outside the stages that replace the base's: those of a set active in all stages."""
        names = set(self.active.values())
        return self.sets[names.pop()].outside if len(names) == 1 else {}
