"""Intensity views of batches (B, C, D, H, W) on the device they are on, drawn apart from applied.

A draw is a (B, C) tensor on the CPU whose neutral value leaves a channel as it is; a channel with the neutral value
is not touched at all. Every function works in place on its batch and returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_ext.settings import setting
from nnssl_ext.views.random import BatchRandom

#: Intensity differences below this are rounding, not signal.
EPSILON = 1e-6


@dataclass(frozen=True)
class IntensitySettings:
    """Probabilities and ranges of the intensity views; zero probabilities are the identity."""

    gamma_probability: float = setting(0.3, "Chance of a gamma curve, per channel.", source="nnU-Net", low=0, high=1)
    gamma: list[float] = setting([0.7, 1.5], "Range of gamma's exponent.", source="nnU-Net", low=0.05, length=2)
    invert_probability: float = setting(
        0.0, "Chance that all intensities of a sample are mirrored about their range.", low=0, high=1
    )
    brightness_probability: float = setting(
        0.15, "Chance of scaled brightness, per channel.", source="nnU-Net", low=0, high=1
    )
    brightness: list[float] = setting([0.75, 1.25], "Range of its factor.", source="nnU-Net", low=0, length=2)
    contrast_probability: float = setting(
        0.15, "Chance of stretched contrast, per channel.", source="nnU-Net", low=0, high=1
    )
    contrast: list[float] = setting([0.75, 1.25], "Range of its factor.", source="nnU-Net", low=0, length=2)
    noise_probability: float = setting(0.1, "Chance of Gaussian noise, per sample.", source="nnU-Net", low=0, high=1)
    noise: list[float] = setting(
        [0.0, 0.3],
        "Range of the noise's standard deviation, in normalised intensities.",
        source="nnU-Net",
        low=0,
        length=2,
    )


@dataclass
class IntensityDraw:
    """What each sample and channel gets: (B, C) on the CPU, ``invert`` and ``noise`` (B,)."""

    gamma: Tensor
    brightness: Tensor
    contrast: Tensor
    noise: Tensor
    invert: Tensor

    @classmethod
    def draw(cls, settings: IntensitySettings, random: BatchRandom, channels: int) -> IntensityDraw:
        def maybe(probability: float, limits: list[float], shape: tuple[int, ...], neutral: float) -> Tensor:
            chosen, value = random.chance(probability, shape), random.uniform(limits[0], limits[1], shape)
            return torch.where(chosen, value, torch.full_like(value, neutral))

        return cls(
            gamma=maybe(settings.gamma_probability, settings.gamma, (channels,), 1.0),
            brightness=maybe(settings.brightness_probability, settings.brightness, (channels,), 1.0),
            contrast=maybe(settings.contrast_probability, settings.contrast, (channels,), 1.0),
            noise=maybe(settings.noise_probability, settings.noise, (), 0.0),
            invert=random.chance(settings.invert_probability),
        )

    def apply(self, batch: Tensor, random: BatchRandom) -> Tensor:
        """Apply all of them in nnU-Net's order: noise, brightness, contrast, gamma; ``invert`` last."""
        add_noise(batch, self.noise, random)
        scale_brightness(batch, self.brightness)
        stretch_contrast(batch, self.contrast)
        bend_gamma(batch, self.gamma)
        return invert(batch, self.invert)


def add_noise(batch: Tensor, deviation: Tensor, random: BatchRandom) -> Tensor:
    """Add Gaussian noise; ``deviation`` (B,)."""
    for sample in torch.nonzero(deviation).flatten().tolist():
        batch[sample] += random.normal(sample, batch.shape[1:]) * float(deviation[sample])
    return batch


def scale_brightness(batch: Tensor, factor: Tensor) -> Tensor:
    """Multiply intensities; ``factor`` (B, C)."""
    for volume, value in _changed(batch, factor, 1.0):
        volume *= value
    return batch


def stretch_contrast(batch: Tensor, factor: Tensor) -> Tensor:
    """Stretch intensities about their mean, kept within the range they had; ``factor`` (B, C)."""
    for volume, value in _changed(batch, factor, 1.0):
        mean, low, high = volume.mean(), volume.min(), volume.max()
        volume.sub_(mean).mul_(value).add_(mean).clamp_(low, high)
    return batch


def bend_gamma(batch: Tensor, exponent: Tensor) -> Tensor:
    """Raise intensities, scaled to [0, 1], to a power, and scale them back; ``exponent`` (B, C)."""
    for volume, value in _changed(batch, exponent, 1.0):
        low, high = volume.min(), volume.max()
        width = (high - low).clamp_min(EPSILON)
        volume.sub_(low).div_(width).clamp_(0, 1).pow_(value).mul_(high - low).add_(low)
    return batch


def invert(batch: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the intensities of chosen samples about the middle of their range; ``chosen`` (B,) bool."""
    for sample in torch.nonzero(chosen).flatten().tolist():
        low, high = batch[sample].amin((1, 2, 3), True), batch[sample].amax((1, 2, 3), True)
        batch[sample] = low + high - batch[sample]
    return batch


def remap_percentiles(batch: Tensor, low: float = 0.001, high: float = 0.999) -> Tensor:
    """Scale each channel so that its ``low`` and ``high`` quantiles become 0 and 1, clipped; constant gives 0."""
    for volume in batch.flatten(0, 1):
        # every k-th voxel is enough for a quantile, and torch.quantile takes 16 million values at most
        sample = volume.flatten()[:: max(1, volume.numel() // 100_000)]
        bottom, top = torch.quantile(sample, torch.tensor([low, high], device=batch.device))
        volume.sub_(bottom).div_((top - bottom).clamp_min(EPSILON)).clamp_(0, 1)
    return batch


def _changed(batch: Tensor, values: Tensor, neutral: float) -> Iterator[tuple[Tensor, float]]:
    for sample, channel in torch.nonzero(values != neutral).tolist():
        yield batch[sample, channel], float(values[sample, channel])
