"""List the intensity views, one class each.

A class holds settings, draw and effect.

To add one, write its class and name it among the bases of ``IntensitySettings``.

B batch, V views of a sample, C channel, D H W voxels. N of the B V C volumes that an augmentation changes, K strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from nnssl_ext.settings import setting
from nnssl_ext.views import filters, intensity
from nnssl_ext.views.cpu import kernels

NNUNET = "nnU-Net"
#: Points of a histogram shift's curve.
POINTS = 8


class Chosen(NamedTuple):
    """The volumes that an augmentation changes, and how.

    Attributes:
        rows: (N,) int64 which of the B V C volumes.
        values: (N, K) float32 strengths.
        host: (N, K) the same on the CPU.
        seeds: (N, 2) seed of the sample's voxel noise and place of the volume in the sample, on the CPU.
        settings: Settings of the views.
        spacing: Voxel edges in mm.
    """

    rows: Tensor
    values: Tensor
    host: Tensor
    seeds: Tensor
    settings: IntensitySettings
    spacing: Sequence[float]

    def part(self, volumes: slice) -> Chosen:
        """Return those of some of the N volumes."""
        rows, values, host, seeds = (tensor[volumes] for tensor in self[:4])
        return Chosen(rows, values, host, seeds, self.settings, self.spacing)


class Augmentation:
    """One intensity view.

    A subclass is a frozen dataclass of its settings: ``NAME_probability``, the chance of an image, and usually
    ``NAME``, a range. With ``NAME_channel_probability`` each channel of a chosen image has that chance.
    """

    name: ClassVar[str]
    #: K, strengths of a channel.
    strengths: ClassVar[int] = 1
    #: Whether the channels of an image share their strengths.
    shared: ClassVar[bool] = False

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        """Map numbers in [0, 1) to strengths: (N, K) -> (N, K)."""
        low, high = getattr(settings, cls.name)
        return low + (high - low) * uniform

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        """Change volumes (N, D, H, W) in place, on every device."""
        raise NotImplementedError

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        """Change one volume (D, H, W) in place. Subclasses may be faster here than the definition."""
        cls.apply(volume[None], chosen)


def _two_sided(limits: Sequence[float], uniform: np.ndarray) -> np.ndarray:
    """Draw half of the numbers below 1, half above. nnU-Net's ``BGContrast`` does so."""
    low, high = limits
    if low >= 1:
        return low + (high - low) * uniform
    return np.where(uniform < 0.5, low + (1 - low) * 2 * uniform, 1 + (high - 1) * (2 * uniform - 1))


@dataclass(frozen=True)
class Noise(Augmentation):
    """Gaussian noise in every voxel."""

    name = "noise"
    shared = True
    noise_probability: float = setting(0.1, "Chance of Gaussian noise, per image.", source=NNUNET, low=0, high=1)
    noise: list[float] = setting(
        [0.0, 0.1],
        "Range of the noise's standard deviation, in normalized intensities.",
        source=NNUNET,
        low=0,
        length=2,
    )

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        intensity.add_noise(volumes, chosen.values[:, 0], chosen.seeds[:, 0].tolist())

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.add_noise(volume, float(chosen.host[0, 0]), chosen.seeds[0].tolist())


@dataclass(frozen=True)
class Blur(Augmentation):
    """Gaussian blur with its own strength along each axis."""

    name = "blur"
    strengths = 3
    blur_probability: float = setting(0.2, "Chance of a Gaussian blur, per image.", source=NNUNET, low=0, high=1)
    blur_channel_probability: float = setting(
        0.5, "Chance of each channel of a blurred image.", source=NNUNET, low=0, high=1
    )
    blur: list[float] = setting(
        [0.5, 1.0],
        "Range of its standard deviation along each axis, in edges of the finest voxel axis.",
        source=NNUNET,
        low=0,
        length=2,
    )

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        filters.blur(volumes, chosen.values, chosen.spacing)

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.blur(volume, chosen.host[0].tolist(), chosen.spacing)


@dataclass(frozen=True)
class Sharpen(Augmentation):
    """Unsharp masking."""

    name = "sharpen"
    sharpen_probability: float = setting(0.0, "Chance of unsharp masking, per image.", source="3DINO", low=0, high=1)
    sharpen: list[float] = setting([0.5, 1.5], "Range of its amount.", low=0, length=2)

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        filters.sharpen(volumes, chosen.values[:, 0], chosen.spacing)

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.sharpen(volume, float(chosen.host[0, 0]), chosen.spacing)


@dataclass(frozen=True)
class Brightness(Augmentation):
    """Scaled brightness."""

    name = "brightness"
    brightness_probability: float = setting(
        0.15, "Chance of scaled brightness, per image.", source=NNUNET, low=0, high=1
    )
    brightness: list[float] = setting(
        [0.75, 1.25], "Range of its factor, one half of the draws below 1.", source=NNUNET, low=0, length=2
    )

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        return _two_sided(settings.brightness, uniform)

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        intensity.scale_brightness(volumes, chosen.values[:, 0])


@dataclass(frozen=True)
class Contrast(Augmentation):
    """Stretch contrast about the mean, within the range."""

    name = "contrast"
    contrast_probability: float = setting(
        0.15, "Chance of stretched contrast, per image.", source=NNUNET, low=0, high=1
    )
    contrast: list[float] = setting(
        [0.75, 1.25], "Range of its factor, one half of the draws below 1.", source=NNUNET, low=0, length=2
    )

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        return _two_sided(settings.contrast, uniform)

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        intensity.scale_contrast(volumes, chosen.values[:, 0])

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.scale_contrast(volume, float(chosen.host[0, 0]))


@dataclass(frozen=True)
class LowResolution(Augmentation):
    """A lower resolution: nearest voxels, interpolated back linearly."""

    name = "low_resolution"
    low_resolution_probability: float = setting(
        0.25, "Chance of a lower resolution, per image.", source=NNUNET, low=0, high=1
    )
    low_resolution_channel_probability: float = setting(
        0.5, "Chance per channel, in an image that is chosen for lower resolution.", source=NNUNET, low=0, high=1
    )
    low_resolution: list[float] = setting(
        [0.5, 1.0], "Range of the resolution that is left.", source=NNUNET, low=0.05, high=1, length=2
    )

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        filters.lower_resolution(volumes, chosen.host[:, 0], chosen.spacing)

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.lower_resolution(volume, float(chosen.host[0, 0]), chosen.spacing)


@dataclass(frozen=True)
class Gibbs(Augmentation):
    """Gibbs ringing."""

    name = "gibbs"
    gibbs_probability: float = setting(0.0, "Chance of Gibbs ringing, per image.", source="3DINO", low=0, high=1)
    gibbs: list[float] = setting(
        [0.4, 0.9], "Range of the frequencies that are kept, as a share of Nyquist's.", low=0.05, high=2, length=2
    )

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        filters.gibbs_ringing(volumes, chosen.values[:, 0])


@dataclass(frozen=True)
class Gamma(Augmentation):
    """A gamma curve over the range of intensities."""

    name = "gamma"
    inverted: ClassVar[bool] = False
    gamma_probability: float = setting(0.3, "Chance of a gamma curve, per image.", source=NNUNET, low=0, high=1)
    gamma: list[float] = setting(
        [0.7, 1.5], "Range of gamma's exponent, one half of the draws below 1.", source=NNUNET, low=0.05, length=2
    )
    retain_stats: bool = setting(True, "Whether a gamma curve keeps the mean and standard deviation.", source=NNUNET)

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        return _two_sided(settings.gamma, uniform)

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        retain = chosen.settings.retain_stats
        intensity.adjust_gamma(volumes, chosen.values[:, 0], invert=cls.inverted, retain_stats=retain)

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        retain = chosen.settings.retain_stats
        kernels.adjust_gamma(volume, float(chosen.host[0, 0]), invert=cls.inverted, retain_stats=retain)


@dataclass(frozen=True)
class InvertedGamma(Gamma):
    """A gamma curve over the negated intensities."""

    name = "inverted_gamma"
    inverted = True
    inverted_gamma_probability: float = setting(
        0.1, "Chance of a gamma curve of the negated intensities, per image.", source=NNUNET, low=0, high=1
    )


@dataclass(frozen=True)
class Histogram(Augmentation):
    """Map intensities by a monotone, piecewise linear curve."""

    name = "histogram"
    strengths = POINTS
    histogram_probability: float = setting(
        0.0, "Chance of a histogram shift, per image.", source="3DINO", low=0, high=1
    )

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        curve = np.sort(uniform, axis=-1)
        curve[:, 0], curve[:, -1] = 0.0, 1.0
        return curve

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        intensity.shift_histogram(volumes, chosen.values)

    @classmethod
    def apply_on_cpu(cls, volume: Tensor, chosen: Chosen) -> None:
        kernels.shift_histogram(volume, chosen.host[0].tolist())


@dataclass(frozen=True)
class Invert(Augmentation):
    """Intensities mirrored about the middle of their range."""

    name = "invert"
    strengths = 0
    invert_probability: float = setting(
        0.0, "Chance that all intensities of an image are mirrored about their range.", low=0, high=1
    )

    @classmethod
    def draw(cls, settings: IntensitySettings, uniform: np.ndarray) -> np.ndarray:
        return uniform

    @classmethod
    def apply(cls, volumes: Tensor, chosen: Chosen) -> None:
        intensity.invert(volumes)


@dataclass(frozen=True)
class IntensitySettings(
    Noise, Blur, Sharpen, Brightness, Contrast, LowResolution, Gibbs, InvertedGamma, Gamma, Histogram, Invert
):
    """Settings of all intensity views, in order. Defaults are nnU-Net's. The order is that of the bases."""

    @cached_property
    def in_use(self) -> list[type[Augmentation]]:
        """Return augmentations with a chance, in order."""
        return [kind for kind in listed(type(self)) if getattr(self, f"{kind.name}_probability")]


def listed(kind: type) -> list[type[Augmentation]]:
    """Return the augmentations of settings, in order."""
    if "name" in vars(kind):
        return [kind]
    return [found for base in kind.__bases__ if base not in (Augmentation, object) for found in listed(base)]
