"""Restore a crop from a corrupted version.

Zhou et al., "Models Genesis", Medical Image Analysis 67:101840, 2021, arXiv 2004.07882.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods.base import Readable
from nnssl_ext.methods.common import OptimizationSettings, SpatialViewSettings
from nnssl_ext.methods.panels import Panel
from nnssl_ext.methods.restoring import RestoringMethod
from nnssl_ext.settings import setting
from nnssl_ext.views.corruption import draw_windows, map_intensities, paint, shuffle_locally
from nnssl_ext.views.random import BatchRandom, shuffle_voxels
from nnssl_ext.views.spatial import crop_batch


@dataclass(frozen=True)
class ModelsGenesisSettings(SpatialViewSettings, OptimizationSettings):
    """Settings of Models Genesis. Its corruptions change intensities, and no other view does."""

    nonlinear_probability: float = setting(0.9, "Chance of a Bezier curve of intensities.", low=0, high=1)
    reversed_probability: float = setting(0.5, "Chance that the curve falls.", low=0, high=1)
    shuffle_probability: float = setting(0.5, "Chance of local shuffling.", low=0, high=1)
    shuffle_windows: int = setting(1000, "Windows to shuffle.", source="Zhou et al. 2021", low=1)
    shuffle_edge: float = setting(0.1, "Largest edge of such a window, as a share of the crop's.", low=0, high=1)
    paint_probability: float = setting(0.9, "Chance of painting over a part of the crop.", low=0, high=1)
    inside_probability: float = setting(0.2, "Share of in-painting; the rest is out-painting.", low=0, high=1)
    inside_windows: int = setting(5, "Most windows of in-painting.", low=1)
    outside_windows: int = setting(5, "Windows that out-painting leaves.", low=1)


class ModelsGenesis(RestoringMethod):
    """Restore the original crop from a corrupted one.

    Intensities are mapped by a Bezier curve, small windows are shuffled, and a part is painted over by noise. The loss
    is the mean squared error. Trains encoder and decoder.
    """

    name = "models_genesis"
    title = "Models Genesis"
    citation = "Zhou et al., Medical Image Analysis 67:101840, 2021, arXiv:2004.07882"
    Settings = ModelsGenesisSettings
    readable = Readable("explained_variance", "Explained variance of the restored crop")

    settings: ModelsGenesisSettings

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return corrupted ``image``, ``target``, and ``weight`` 1 within the case. Each is (B, C, D, H, W).

        In evaluation also ``shuffled``, a corrupted crop of shuffled voxels, and ``shuffled_target``.
        """
        target, inside = crop_batch(batch.boxes[0], self.geometry.crop_size, random.device)
        weight = torch.ones_like(target) if inside is None else inside.to(target.dtype).expand_as(target)
        views = {"image": self._corrupt(target, random), "target": target, "weight": weight}
        if not self.training:
            shuffled = shuffle_voxels(target, random)
            views |= {"shuffled": self._corrupt(shuffled, random), "shuffled_target": shuffled}
        return views

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        return [
            [
                Panel("corrupted input", views["image"][0, 0]),
                Panel("restoration", self.restore(views["image"][:1], views)[0, 0]),
                Panel("truth (target)", views["target"][0, 0]),
            ]
        ]

    def _corrupt(self, target: Tensor, random: BatchRandom) -> Tensor:
        """Corrupt each crop by its own draws: (B, C, D, H, W)."""
        s, size, images = self.settings, self.geometry.crop_size, target.clone()
        for sample, image in enumerate(images):
            draw = random.generator(sample)
            chances = draw.random(5)
            controls, number = draw.random((2, 2)), int(draw.integers(1, s.inside_windows + 1))
            if chances[0] < s.nonlinear_probability:
                map_intensities(image, controls, bool(chances[1] < s.reversed_probability))
            if chances[2] < s.shuffle_probability:
                windows = draw_windows(draw, size, s.shuffle_windows, 0.0, s.shuffle_edge)
                shuffle_locally(image, *windows, draw)
            if chances[3] < s.paint_probability:
                within = bool(chances[4] < s.inside_probability)
                low, high = (1 / 6, 1 / 3) if within else (3 / 7, 4 / 7)
                windows = draw_windows(draw, size, number if within else s.outside_windows, low, high)
                # noise of the image's own range: another range would show where, and which curve
                noise = torch.rand(image.shape, generator=random.noise(sample), device=image.device)
                ends = image.flatten(1).aminmax(dim=1)
                darkest, brightest = ends.min[:, None, None, None], ends.max[:, None, None, None]
                paint(image, *windows, torch.lerp(darkest, brightest, noise), inside=within)
        return images
