"""Draw intensity views on the CPU, apply them on the device.

B batch, V views of a sample, C channel, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.settings import setting
from nnssl_ext.views.augmentations import Augmentation, Chosen, IntensitySettings, Noise
from nnssl_ext.views.cpu.chunks import has_kernels
from nnssl_ext.views.random import BatchRandom, pack_to_device

__all__ = ["CustomIntensitySettings", "Exclusive", "IntensityDraw", "IntensitySettings", "default"]


def default(name: str, value: Any, source: str = "") -> Any:
    """Declare a setting again, with another default."""
    inherited = next(field for field in fields(IntensitySettings) if field.name == name)
    return setting(value, **{**inherited.metadata, "source": source})


@dataclass(frozen=True)
class CustomIntensitySettings(IntensitySettings):
    """Base of lists that differ from nnU-Net's.

    They have one gamma that changes statistics, no blur and no low resolution.
    """

    noise: list[float] = default("noise", [0.0, 0.3])
    blur_probability: float = default("blur_probability", 0.0, source="0.2 in nnU-Net")
    blur_channel_probability: float = default("blur_channel_probability", 1.0, source="0.5 in nnU-Net")
    low_resolution_probability: float = default("low_resolution_probability", 0.0, source="0.25 in nnU-Net")
    inverted_gamma_probability: float = default("inverted_gamma_probability", 0.0, source="0.1 in nnU-Net")
    retain_stats: bool = default("retain_stats", False, source="true in nnU-Net")


@dataclass(frozen=True)
class Exclusive:
    """Augmentations of which an image gets one at most.

    Attributes:
        names: The augmentations. Their own chances are weights.
        probability: Chance that an image gets one of them.
    """

    names: tuple[str, ...]
    probability: float

    def choose(self, settings: IntensitySettings, uniform: np.ndarray, chosen: np.ndarray) -> None:
        """Overwrite the group's columns in ``chosen`` (images, kinds).

        They are drawn from ``uniform`` of that shape.
        """
        columns = [n for n, kind in enumerate(settings.in_use) if kind.name in self.names]
        if not columns or not self.probability:
            chosen[:, columns] = False
            return
        weights = np.cumsum([getattr(settings, f"{settings.in_use[n].name}_probability") for n in columns])
        place = uniform[:, columns[0]] / self.probability  # below 1 where the image gets one
        which = np.searchsorted(weights / weights[-1], place, side="right")
        chosen[:, columns] = which[:, None] == np.arange(len(columns))


@dataclass
class IntensityDraw:
    """The intensity views of a batch.

    Attributes:
        steps: Each augmentation with the volumes that it changes, in order.
        volumes: V C, volumes of a sample.
        samples: B.
        masked: Channels that stay zero where all of them are, as in nnU-Net.
    """

    steps: list[tuple[type[Augmentation], Chosen]]
    volumes: int
    samples: int
    masked: Sequence[int] = ()

    @classmethod
    def draw(
        cls,
        settings: IntensitySettings,
        random: BatchRandom,
        channels: int,
        spacing: Sequence[float],
        views: int = 1,
        exclusive: Sequence[Exclusive] = (),
        masked: Sequence[bool] = (),
    ) -> IntensityDraw:
        """Draw for a batch.

        Args:
            settings: Which augmentations, how often and how strong.
            random: One stream per sample.
            channels: C.
            spacing: Voxel edges in mm.
            views: V; each view of a sample is an image of its own.
            exclusive: Groups of which an image gets one augmentation at most.
            masked: Channels that stay zero outside of the image, a bool for each.
        """
        if not settings.in_use:
            return cls([], views * channels, len(random))
        numbers = [1 + channels * (1 + kind.strengths) for kind in settings.in_use]
        # all random numbers of a sample at once; numpy is faster than torch with small arrays
        uniform = random.uniform(0.0, 1.0, (views, sum(numbers))).numpy().reshape(len(random) * views, sum(numbers))
        noisy = Noise in settings.in_use
        seeds = random.integers(0, (1 << 62) - 1) if noisy else torch.zeros(len(random), dtype=torch.int64)
        chances = np.array([getattr(settings, f"{kind.name}_probability") for kind in settings.in_use])
        ends = np.cumsum(numbers, dtype=int)
        chosen_images = uniform[:, ends - numbers] < chances  # (B V, kinds): most kinds change nothing in a batch
        for group in exclusive:
            group.choose(settings, uniform[:, ends - numbers], chosen_images)
        steps = []
        for n in np.flatnonzero(chosen_images.any(0)).tolist():
            kind = settings.in_use[n]
            part = uniform[:, ends[n] - numbers[n] : ends[n]]
            of_channels = getattr(settings, f"{kind.name}_channel_probability", 1.0)
            rows = np.flatnonzero(chosen_images[:, n, None] & (part[:, 1 : 1 + channels] < of_channels))
            if not len(rows):
                continue
            strength = part[:, 1 + channels :].reshape(len(part), channels, kind.strengths)
            if kind.shared:
                strength = np.broadcast_to(strength[:, :1], strength.shape)
            values = kind.draw(settings, strength.reshape(len(part) * channels, kind.strengths)[rows])
            host = torch.from_numpy(np.ascontiguousarray(values, np.float32))
            sample, place = np.divmod(rows, views * channels)
            owner = torch.stack([seeds[torch.from_numpy(sample)], torch.from_numpy(place)], 1)
            steps.append((kind, Chosen(torch.from_numpy(rows), host, host, owner, settings, spacing)))
        return cls(steps, views * channels, len(random), np.flatnonzero(masked).tolist())

    def of(self, samples: slice) -> IntensityDraw:
        """Return the views of some of the samples."""
        begin, end, _ = samples.indices(self.samples)
        if end - begin == self.samples:
            return self
        steps = []
        for kind, chosen in self.steps:
            first, last = torch.searchsorted(chosen.rows, torch.tensor([begin, end]) * self.volumes).tolist()
            if last > first:
                part = chosen.part(slice(first, last))
                steps.append((kind, part._replace(rows=part.rows - begin * self.volumes)))
        return IntensityDraw(steps, self.volumes, end - begin, self.masked)

    def apply(self, batch: Tensor) -> Tensor:
        """Apply all augmentations in place. (B, C, D, H, W) or (B, V, C, D, H, W)"""
        volumes = batch.view(-1, *batch.shape[-3:])
        outside = outside_of([batch], self.masked) if self.steps else None
        if has_kernels(volumes.device, volumes.shape[1:]):
            for kind, chosen in self.steps:
                for n, row in enumerate(chosen.rows.tolist()):
                    kind.apply_on_cpu(volumes[row], chosen.part(slice(n, n + 1)))
        elif volumes.device.type == "cpu":
            # one sample after the other, so that rounding does not depend on the rest of the batch
            for b in range(self.samples):
                first = b * self.volumes
                self.of(slice(b, b + 1)).apply_definition(volumes[first : first + self.volumes])
        else:
            self.apply_definition(volumes)
        keep_zero(batch, self.masked, outside)
        return batch

    def apply_definition(self, volumes: Tensor) -> None:
        """Apply the definitions to (B V C, D, H, W) in place. Each takes all of its volumes at once."""
        sent = pack_to_device([tensor for _, chosen in self.steps for tensor in chosen[:2]], volumes.device)
        for (kind, chosen), rows, values in zip(self.steps, sent[::2], sent[1::2], strict=True):
            moved = chosen._replace(rows=rows, values=values)
            if len(rows) == len(volumes):
                kind.apply(volumes, moved)
                continue
            changed = volumes.index_select(0, rows)
            kind.apply(changed, moved)
            volumes.index_copy_(0, rows, changed)


def outside_of(images: Sequence[Tensor], masked: Sequence[int]) -> Tensor | None:
    """Find what lies outside of all images.

    (..., C, D, H, W) -> (..., D, H, W) bool, None without masked channels.
    """
    zeros = [image.select(-4, channel) == 0 for image in images for channel in masked]
    return torch.stack(zeros).all(0) if zeros else None


def keep_zero(images: Tensor, masked: Sequence[int], outside: Tensor | None) -> None:
    """Set masked channels to zero outside of the image, in place."""
    if outside is not None:
        for channel in masked:
            images.select(-4, channel).masked_fill_(outside, 0.0)
