"""Shared parts of objectives on patches of one window.

B batch, N patches, C channel, D H W voxels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.methods.base import DataGeometry
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.methods.encoder_only import EncoderMethod
from nnssl_ext.networks.base import Backbone
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import CustomIntensitySettings, IntensityDraw, default
from nnssl_ext.views.layout import Layout, cut_patches, standardize
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.rows import RowLayout
from nnssl_ext.views.spatial import SpatialRange


@dataclass(frozen=True)
class PatchIntensitySettings(CustomIntensitySettings):
    """Intensity views of each patch. Standardizing undoes brightness and contrast."""

    gamma_probability: float = default("gamma_probability", 0.5, source="0.3 in nnU-Net")
    brightness_probability: float = default("brightness_probability", 0.0)
    contrast_probability: float = default("contrast_probability", 0.3)
    noise_probability: float = default("noise_probability", 0.2)


@dataclass(frozen=True)
class PatchSettings(TrainingSettings):
    """Reading and appearance of patches."""

    zoom: float = setting(
        2.0, "Largest magnification of the patches, for small cases. The smallest tenth may exceed it.", low=1, high=8
    )
    standardize: bool = setting(
        True, "Zero mean and unit deviation per patch.", source="intensity drifts reveal a patch's place"
    )
    intensity: PatchIntensitySettings = field(default_factory=PatchIntensitySettings)
    embedding_dim: int = setting(128, "Width of a patch's vector.", low=1)
    hidden_dims: list[int] = setting([512], "Widths of the head's layers.", low=1)


@dataclass(frozen=True)
class SpacedPatchSettings(PatchSettings):
    """The same, for patches with a gap between them."""

    gap: float = setting(
        0.25, "Least distance of neighbors, as a share of a patch's edge.", source="nearer edges match", low=0, high=2
    )
    jitter: float = setting(0.125, "Largest shift of a patch, as a share of its edge.", low=0, high=1)


class PatchMethod(EncoderMethod):
    """Read patches of one window and encode them.

    Attributes:
        layout: Places of the patches in the window.
    """

    layout: Layout | RowLayout

    def __init__(self, backbone: Backbone, settings: Any, geometry: DataGeometry) -> None:
        layout = self.solve_layout(settings, geometry)
        super().__init__(backbone, settings, geometry, stages=layout.stages)
        self.layout = layout

    @classmethod
    @abstractmethod
    def solve_layout(cls, settings: Any, geometry: DataGeometry) -> Layout | RowLayout:
        """Choose the patches' places for these data.

        Raises:
            UserError: If the cases hold no window.
        """

    @classmethod
    def crops(cls, settings: Any, geometry: DataGeometry) -> CropRequest:
        """Request one unrotated, unpadded window, mostly body."""
        layout = cls.solve_layout(settings, geometry)
        still = SpatialRange(geometry.spacing)
        return CropRequest((Crop(layout.window, still, scale=1 / layout.zoom, fit=True, parts=tuple(layout.middles)),))

    def __str__(self) -> str:
        return f"{self.title}: {self.layout}"

    def read_patches(self, batch: CropBatch, random: BatchRandom, starts: Tensor) -> Tensor:
        """Read patches: (B, N, C, D, H, W).

        Args:
            batch: Windows.
            random: One stream per sample.
            starts: (B, N, 3) lowest voxel of each patch, on the CPU.
        """
        shifts = random.uniform(0, 1, starts.shape[1:])
        patches = cut_patches(batch.boxes[0], self.layout.window, starts, self.layout.patch, shifts, random.device)
        number, channels = patches.shape[1:3]
        spacing = self.geometry.spacing
        draw = IntensityDraw.draw(
            self.settings.intensity, random, channels, spacing, views=number, masked=self.geometry.masked
        )
        draw.apply(patches)
        return standardize(patches) if self.settings.standardize else patches
