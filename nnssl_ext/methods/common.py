"""Share settings of views and optimization between methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe
from nnssl_ext.networks.base import Backbone, Triple, triple
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.rotations import rotatable_size
from nnssl_ext.views.spatial import SpatialRange

TRANSFORMER_SOURCE = "Primus, arXiv 2503.01835, and the masked autoencoder"
#: What settings without a value mean, per kind of network. The rate is the largest.
UNET_RECIPE = OptimizerRecipe("adamw", math.inf, 1e-5, "cosine", 0.02)
TRANSFORMER_RECIPE = OptimizerRecipe("adamw", 3e-4, 0.05, "cosine", 0.05, max_grad_norm=1.0, betas=(0.9, 0.98))


@dataclass(frozen=True)
class OptimizationSettings:
    """Settings of optimization."""

    optimizer: str = setting("adamw", "Optimizer.", choices=("adam", "adamw", "sgd"))
    weight_decay: float | None = setting(
        None, "Weight decay. null: 1e-5, on a vision transformer 0.05.", source=f"0.05: {TRANSFORMER_SOURCE}", low=0
    )
    schedule: str = setting(
        "cosine",
        "Decay of the learning rate. step halves it after each fifth of the steps.",
        choices=("constant", "poly", "cosine", "step"),
    )
    warmup: float | None = setting(
        None,
        "Share of the steps with a rising learning rate. null: 0.02, on a vision transformer 0.05.",
        source=f"0.05: {TRANSFORMER_SOURCE}",
        low=0,
        high=0.9,
    )

    def heaviest(self) -> Any:
        """Return settings that need most memory, for estimates."""
        return self

    def recipe(self, learning_rate: float, backbone: Backbone) -> OptimizerRecipe:
        """Build the optimizer recipe.

        Args:
            learning_rate: The method's peak on a U-Net. A vision transformer takes at most 3e-4.
            backbone: The network.
        """
        base = TRANSFORMER_RECIPE if backbone.is_transformer else UNET_RECIPE
        return replace(
            base,
            name=self.optimizer,
            learning_rate=min(learning_rate, base.learning_rate),
            weight_decay=base.weight_decay if self.weight_decay is None else self.weight_decay,
            schedule=self.schedule,
            warmup=base.warmup if self.warmup is None else self.warmup,
        )


@dataclass(frozen=True)
class IntensityViewSettings:
    """Intensity views."""

    intensity: IntensitySettings = field(default_factory=IntensitySettings)


@dataclass(frozen=True)
class TrainingSettings(OptimizationSettings, IntensityViewSettings):
    """Settings of intensity views and optimization.

    Settings of a method derive from it and may change defaults.
    """


def view_size(geometry: DataGeometry, margin: float, alike: np.ndarray | None = None) -> Triple:
    """Compute the edges of rotated views.

    They show the plan's resolution in most cases.

    A rotated view reaches beyond its edges. In cases that are hardly larger than the crop, a smaller view is taken
    rather than a magnified one.

    Args:
        geometry: The data and the network's strides.
        margin: Extent of a typical rotated view as a multiple of its edge.
        alike: (3, 3) bool, axes whose edges must be equal. None leaves them independent.
    """
    cases = geometry.case_size or (math.inf,) * 3
    limits = [math.floor(min(edge, 1e9) / margin) for edge in cases]
    size = [min(pair) for pair in zip(geometry.crop_size, limits, strict=True)]
    return rotatable_size(size, geometry.strides[-1], np.eye(3, dtype=bool) if alike is None else alike)


def region_size(geometry: DataGeometry, view: Triple, extent: float) -> Triple:
    """Compute the region to read for rotated views.

    Args:
        geometry: The data and the network's strides.
        view: Edges of the views.
        extent: Largest extent of a view as a multiple of its edge.
    """
    cases = geometry.case_size or (math.inf,) * 3
    return triple(int(max(edge, min(math.ceil(extent * edge), case))) for edge, case in zip(view, cases, strict=True))


@dataclass(frozen=True)
class SpatialViewSettings:
    """Spatial views."""

    flip: float = setting(0.5, "Chance of a mirror, per axis and crop.", source="nnU-Net", low=0, high=1)
    rot90: float = setting(0.3, "Chance of quarter turns in a plane of equal edges and spacing.", low=0, high=1)
    affine: float = setting(0.3, "Chance of a rotation and zoom, per crop.", source="nnU-Net", low=0, high=1)
    rotation: float = setting(15.0, "Largest angle about each axis in degrees.", low=0, high=180)
    zoom: list[float] = setting([0.8, 1.25], "Range of the magnification.", low=0.1, high=10, length=2)

    def spatial(self, geometry: DataGeometry) -> SpatialRange:
        """Build the range of spatial views of a crop."""
        zoom = (self.zoom[0], self.zoom[1])
        return SpatialRange(geometry.spacing, self.flip, self.rot90, self.affine, self.rotation, zoom)


@dataclass(frozen=True)
class SharedSettings(SpatialViewSettings, TrainingSettings):
    """Spatial views in addition."""
