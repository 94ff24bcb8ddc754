"""Settings that methods share: intensity views, spatial views and optimization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.spatial import SpatialRange


@dataclass(frozen=True)
class TrainingSettings:
    """Intensity views and optimization. Settings of a method derive from it and may change defaults."""

    intensity: IntensitySettings = field(default_factory=IntensitySettings)
    optimizer: str = setting("adamw", "Optimizer.", choices=("adam", "adamw", "sgd"))
    weight_decay: float = setting(1e-5, "Weight decay.", low=0)
    schedule: str = setting("cosine", "Decay of the learning rate.", choices=("constant", "poly", "cosine"))
    warmup: float = setting(0.02, "Share of the steps with a rising learning rate.", low=0, high=0.9)

    def heaviest(self) -> Any:
        """Return settings that draw what takes most memory at every step, for estimates."""
        return self

    def recipe(self, learning_rate: float) -> OptimizerRecipe:
        """Build the optimizer recipe with the method's peak learning rate."""
        return OptimizerRecipe(self.optimizer, learning_rate, self.weight_decay, self.schedule, self.warmup)


@dataclass(frozen=True)
class SharedSettings(TrainingSettings):
    """Spatial views in addition."""

    flip: float = setting(0.5, "Chance of a mirror, per axis and crop.", source="nnU-Net", low=0, high=1)
    rot90: float = setting(0.3, "Chance of quarter turns in a plane of equal edges and spacing.", low=0, high=1)
    affine: float = setting(0.3, "Chance of a rotation and zoom, per crop.", source="nnU-Net", low=0, high=1)
    rotation: float = setting(15.0, "Largest angle about each axis in degrees.", low=0, high=180)
    zoom: list[float] = setting([0.8, 1.25], "Range of the magnification.", low=0.1, high=10, length=2)

    def spatial(self, geometry: DataGeometry) -> SpatialRange:
        """Build the range of spatial views of a crop."""
        zoom = (self.zoom[0], self.zoom[1])
        return SpatialRange(geometry.spacing, self.flip, self.rot90, self.affine, self.rotation, zoom)
