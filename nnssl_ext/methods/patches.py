"""What objectives on patches of one window share: the layout's settings and the patches.

B batch, N patches, C channel, D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw, IntensitySettings
from nnssl_ext.views.layout import Layout, cut_patches, standardise
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.rows import RowLayout
from nnssl_ext.views.spatial import SpatialRange


@dataclass(frozen=True)
class PatchIntensitySettings(IntensitySettings):
    """Intensity views of each patch by itself; standardising makes brightness and contrast moot."""

    gamma_probability: float = setting(
        0.5, "Chance of a gamma curve, per channel.", source="0.3 in nnU-Net", low=0, high=1
    )
    brightness_probability: float = setting(0.0, "Chance of scaled brightness, per channel.", low=0, high=1)
    contrast_probability: float = setting(0.3, "Chance of stretched contrast, per channel.", low=0, high=1)
    noise_probability: float = setting(0.2, "Chance of Gaussian noise, per sample.", low=0, high=1)


@dataclass(frozen=True)
class PuzzleSettings(TrainingSettings):
    """How patches are read and look."""

    zoom: float = setting(2.0, "Largest magnification of the window, so that small cases hold it.", low=1, high=8)
    standardise: bool = setting(
        True, "Zero mean and unit deviation per patch.", source="intensity drifts tell where a patch is from"
    )
    intensity: PatchIntensitySettings = field(default_factory=PatchIntensitySettings)
    embedding: int = setting(128, "Width of a patch's vector.", low=1)
    hidden: list[int] = setting([512], "Widths of the head's layers.", low=1)

    def peak(self) -> OptimizerRecipe:
        """The optimiser of all puzzles."""
        return self.recipe(1e-3)


@dataclass(frozen=True)
class SpacedSettings(PuzzleSettings):
    """The same, for patches that lie apart from each other."""

    gap: float = setting(
        0.25, "Least distance of neighbours, as a share of a patch's edge.", source="nearer edges match", low=0, high=2
    )
    jitter: float = setting(0.125, "How far a patch may be moved, as a share of its edge.", low=0, high=1)


def window_request(layout: Layout | RowLayout, geometry: DataGeometry) -> CropRequest:
    """One window, never turned: which way is up is what patches are told by; never padded; patches mostly body."""
    parts = tuple(layout.middles) if isinstance(layout, Layout) else ()
    still = SpatialRange(geometry.spacing)
    return CropRequest((Crop(layout.window, still, scale=1 / layout.zoom, fit=True, parts=parts),))


def read_patches(
    settings: PuzzleSettings,
    geometry: DataGeometry,
    batch: CropBatch,
    random: BatchRandom,
    window: tuple[int, int, int],
    starts: Tensor,
    size: tuple[int, int, int],
) -> Tensor:
    """Patches as the network sees them: (B, N, C, *size).

    Args:
        settings, geometry: The method's.
        batch: Windows that were read.
        random: One stream per sample.
        window: Edges of the window.
        starts: (B, N, 3) lowest voxel of each patch.
        size: Edges of a patch.
    """
    moved = random.uniform(0, 1, starts.shape[1:])
    patches = torch.stack(
        [
            cut_patches(box, window, places, size, moves, random.device)
            for box, places, moves in zip(batch.boxes[0], starts, moved, strict=True)
        ]
    )
    # each patch looks different: to the intensity views patches are channels
    merged = patches.flatten(1, 2)
    IntensityDraw.draw(settings.intensity, random, merged.shape[1], geometry.spacing).apply(merged, random)
    patches = merged.view_as(patches)
    return standardise(patches) if settings.standardise else patches
