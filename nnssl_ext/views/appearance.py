"""How a crop looks: all intensity and filter views together, drawn from one section of settings.

B batch, C channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.settings import setting
from nnssl_ext.views import filters, intensity
from nnssl_ext.views.random import BatchRandom

#: Points of a histogram shift's curve.
POINTS = 8
#: The strength that changes nothing, where it is not zero.
NEUTRAL = {"gamma": 1.0, "brightness": 1.0, "contrast": 1.0, "low_resolution": 1.0}


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
    blur_probability: float = setting(
        0.0, "Chance of a Gaussian blur, per channel.", source="0.2 in nnU-Net", low=0, high=1
    )
    blur: list[float] = setting(
        [0.5, 1.0],
        "Range of its standard deviation, in edges of the finest voxel axis.",
        source="nnU-Net",
        low=0,
        length=2,
    )
    low_resolution_probability: float = setting(
        0.0, "Chance of a lower resolution, per channel.", source="0.25 in nnU-Net", low=0, high=1
    )
    low_resolution: list[float] = setting(
        [0.5, 1.0], "Range of the resolution that is left.", source="nnU-Net", low=0.05, high=1, length=2
    )
    sharpen_probability: float = setting(0.0, "Chance of unsharp masking, per channel.", source="3DINO", low=0, high=1)
    sharpen: list[float] = setting([0.5, 1.5], "Range of its amount.", low=0, length=2)
    histogram_probability: float = setting(
        0.0, "Chance of a histogram shift, per channel.", source="3DINO", low=0, high=1
    )
    gibbs_probability: float = setting(0.0, "Chance of Gibbs ringing, per channel.", source="3DINO", low=0, high=1)
    gibbs: list[float] = setting(
        [0.4, 0.9], "Range of the frequencies that are kept, as a share of Nyquist's.", low=0.05, high=2, length=2
    )

    @cached_property
    def table(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the views that are drawn per channel: names, and (N, 1) lower ends, widths, neutral values, chances."""
        in_use = [name for name in ("blur", "low_resolution", "sharpen", "gibbs") if _chance(self, name)]
        names = [*in_use, "gamma", "brightness", "contrast"]
        low, high = np.array([getattr(self, name) for name in names], np.float32).T[..., None]
        neutral = np.array([[NEUTRAL.get(name, 0.0)] for name in names], np.float32)
        return names, low, high - low, neutral, np.array([[_chance(self, name)] for name in names], np.float32)


@dataclass
class IntensityDraw:
    """What each sample and channel gets: (B, C) on the CPU; ``invert`` and ``noise`` (B,); None is off for all."""

    gamma: Tensor
    brightness: Tensor
    contrast: Tensor
    noise: Tensor
    invert: Tensor
    blur: Tensor | None = None
    low_resolution: Tensor | None = None
    sharpen: Tensor | None = None
    histogram: tuple[Tensor, Tensor] | None = None
    gibbs: Tensor | None = None
    spacing: Sequence[float] = field(default=(1.0, 1.0, 1.0))

    @classmethod
    def draw(
        cls, settings: IntensitySettings, random: BatchRandom, channels: int, spacing: Sequence[float]
    ) -> IntensityDraw:
        """Draw for a batch; ``spacing`` in mm, for the filters."""
        names, low, span, neutral, chances = settings.table
        # one draw for everything; what a sample gets as a whole is last
        draws = random.uniform(0.0, 1.0, (2 * len(names) * channels + 3,))
        # small arrays are faster in numpy
        chance, place = draws[:, :-3].view(len(random), 2, len(names), channels).numpy().swapaxes(0, 1)
        values = np.where(chance < chances, low + span * place, neutral)
        strength: dict[str, Any] = dict(zip(names, torch.from_numpy(values).unbind(1), strict=True))
        least, most = settings.noise
        result = cls(
            **strength,
            noise=(draws[:, -3] < settings.noise_probability) * (least + (most - least) * draws[:, -2]),
            invert=draws[:, -1] < settings.invert_probability,
            spacing=spacing,
        )
        if settings.histogram_probability:
            chosen = random.chance(settings.histogram_probability, (channels,))
            result.histogram = (random.uniform(0, 1, (channels, POINTS)), chosen)
        return result

    def of(self, samples: slice) -> IntensityDraw:
        """Those of some of the samples."""
        if (samples.start, samples.stop) == (0, len(self.noise)):
            return self
        parts: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                parts[name] = value[samples]
            elif name == "histogram" and value is not None:
                parts[name] = tuple(part[samples] for part in value)
        return replace(self, **parts)

    def apply(self, batch: Tensor, random: BatchRandom) -> Tensor:
        """Apply all of them, in nnU-Net's order as far as nnU-Net has them, to (B, C, D, H, W) in place."""
        intensity.add_noise(batch, self.noise, random)
        if self.blur is not None:
            filters.blur(batch, self.blur, self.spacing)
        if self.sharpen is not None:
            filters.sharpen(batch, self.sharpen, self.spacing)
        intensity.scale_brightness(batch, self.brightness)
        intensity.stretch_contrast(batch, self.contrast)
        if self.low_resolution is not None:
            filters.lower_resolution(batch, self.low_resolution, self.spacing)
        if self.gibbs is not None:
            filters.gibbs_ringing(batch, self.gibbs)
        intensity.adjust_gamma(batch, self.gamma)
        if self.histogram is not None:
            filters.shift_histogram(batch, *self.histogram)
        return intensity.invert(batch, self.invert)


def _chance(settings: IntensitySettings, name: str) -> float:
    return getattr(settings, f"{name}_probability")
