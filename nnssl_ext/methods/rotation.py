"""Rotation: tell by which turn a crop was turned.

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018; in 3-D Taleb et al.,
"3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829. Encoder only.

B batch, N turned copies of a crop, C channel, D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe, Readable
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.methods.encoder_only import EncoderMethod, classification, sample_index
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import GridHead
from nnssl_ext.networks.probe import SpacingProbe
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.filters import simulate_thick_slices
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.rotations import cube_group, grid_turns, published_turns, same_spacing, turnable_size
from nnssl_ext.views.spatial import SpatialRange, crop_batch, rotation_matrix, subview

TALEB = "Taleb et al. 2020"


@dataclass(frozen=True)
class RotationSettings(TrainingSettings):
    """Settings of rotation."""

    turns: str = setting(
        "published",
        "The identity and 90, 180, 270 degrees about each axis, or all rotations of the cube.",
        source=TALEB,
        choices=("published", "cube"),
    )
    keep_grid: bool = setting(
        True,
        "Only turns that map the grid to itself, given its spacing.",
        source="others are told by the spacing alone",
    )
    copies: int = setting(2, "Turned copies of each crop.", source=f"1 in {TALEB}", low=1)
    angle: float = setting(5.0, "Largest small angle about each axis, in degrees, on top of the turn.", low=0, high=30)
    thick_probability: float = setting(
        0.8,
        "Chance of a lower resolution along one axis, after the turn.",
        source="hides the slice axis",
        low=0,
        high=1,
    )
    thick: list[float] = setting([0.25, 0.8], "Range of the resolution that is left.", low=0.05, high=1, length=2)
    hidden: list[int] = setting([256], "Widths of the head's layers.", low=1)


class Rotation(EncoderMethod):
    """See the module's docstring."""

    name = "rotation"
    title = "Rotation"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Gidaris et al., ICLR 2018, arXiv:1803.07728"
    Settings = RotationSettings
    readable = Readable("accuracy", "Accuracy of the turn")

    settings: RotationSettings

    def __init__(self, backbone: Backbone, settings: RotationSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        self.turns = allowed_turns(settings, geometry)
        self.size = self.box(settings, geometry)
        self.head = GridHead(channels=self.channels, hidden=settings.hidden, outputs=len(self.turns))
        self.probe = SpacingProbe(classes=len(self.turns))

    @classmethod
    def box(cls, settings: RotationSettings, geometry: DataGeometry) -> tuple[int, int, int]:
        """Edges of the crop: equal along axes that turns exchange."""
        alike = same_spacing(geometry.spacing) if settings.keep_grid else np.ones((3, 3), bool)
        return turnable_size(geometry.crop_size, geometry.strides[-1], alike)

    @classmethod
    def crops(cls, settings: RotationSettings, geometry: DataGeometry) -> CropRequest:
        spatial = SpatialRange(geometry.spacing)
        return CropRequest((Crop(cls.box(settings, geometry), spatial, fit=True, centered=True),))

    def clipped_modules(self) -> list[nn.Module]:
        """The probe's gradient is no part of the task's."""
        task = [part for part in self.children() if part is not self.probe]
        return [nn.ModuleList(task), self.probe]

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.recipe(1e-3)

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """``image`` (B, N, C, D, H, W), ``turn`` (B, N), ``index`` (B,)."""
        s, spacing, copies = self.settings, self.geometry.spacing, self.settings.copies
        label = random.integers(0, len(self.turns) - 1, (copies,))
        angles = random.uniform(-s.angle, s.angle, (copies, 3)).numpy()
        axis = random.integers(0, 2, (copies,))
        zoom = random.uniform(s.thick[0], s.thick[1], (copies,))
        zoom = torch.where(random.chance(s.thick_probability, (copies,)), zoom, torch.ones(()))
        # thick slices may be turned in their plane alone, as in nnU-Net
        free = SpatialRange(spacing).turning_axes()
        images = []
        for copy in range(copies):
            # small angles are of the turned crop, so that they say nothing of the turn; one resampling does both
            boxes = [
                subview(box, self.size, self.turns[label[b, copy]] @ rotation_matrix(angles[b, copy] * free, spacing))
                for b, box in enumerate(batch.boxes[0])
            ]
            image, _ = crop_batch(boxes, self.size, random.device)
            IntensityDraw.draw(s.intensity, random, image.shape[1], spacing).apply(image, random)
            images.append(simulate_thick_slices(image, axis[:, copy], zoom[:, copy]))
        index = sample_index(batch.indices, random.device)
        return {"image": torch.stack(images, 1), "turn": to_device(label, random.device), "index": index}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``; in evaluation ``accuracy``, its ``chance``, ``spacing_probe_accuracy`` and health; each (B,)."""
        image, label = views["image"], views["turn"]
        features = self.encode(image)
        loss, accuracy = classification(self.head(features), label)
        guess = self.probe(image.flatten(0, 1)).unflatten(0, label.shape)
        probe_loss, probe_accuracy = classification(guess, label)
        # the probe learns beside the task, but its loss is none of the objective's
        result = {"loss": loss + probe_loss - probe_loss.detach()}
        if not self.training:
            result |= {"accuracy": accuracy, "chance": torch.full_like(loss, 1 / len(self.turns))}
            result |= {"spacing_probe_accuracy": probe_accuracy, **self.health(features, views["index"])}
        return result


def allowed_turns(settings: RotationSettings, geometry: DataGeometry) -> list[np.ndarray]:
    """The classes: 10 or 24 on isotropic grids, 6 or 8 with one odd axis, 4 with three spacings."""
    turns = published_turns() if settings.turns == "published" else cube_group()
    return grid_turns(turns, geometry.spacing) if settings.keep_grid else turns
