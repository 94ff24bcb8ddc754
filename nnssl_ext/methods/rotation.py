"""Rotation: recognize by which rotation a crop was rotated.

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018. In 3-D: Taleb et al.,
"3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829.

B batch, N rotated copies of a crop, C channel, D H W voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.reconstruction import explained_variance, squared_error
from nnssl_ext.methods.base import DataGeometry, Readable, ValidationCheck
from nnssl_ext.methods.common import TrainingSettings, region_size, view_size
from nnssl_ext.methods.encoder_only import EncoderMethod, classification
from nnssl_ext.methods.panels import Panel
from nnssl_ext.networks.base import Backbone, Triple, triple
from nnssl_ext.networks.heads import GridHead, grid_features, layers
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.filters import simulate_thick_slices
from nnssl_ext.views.masking import draw_block_mask
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.rotations import (
    cube_group,
    grid_rotations,
    published_rotations,
    rotate_back,
    rotation_name,
    same_spacing,
)
from nnssl_ext.views.spatial import SpatialRange, crop_batch, rotation_matrix, subview

TALEB, TANG = "Taleb et al. 2020", "Swin UNETR, Tang et al. 2022"
#: Validation accuracy from which the task is called solved.
SOLVED = 0.98


@dataclass(frozen=True)
class RotationSettings(TrainingSettings):
    """Settings of rotation."""

    rotations: str = setting(
        "published",
        "The identity and 90, 180, 270 degrees about each axis, or all rotations of the cube.",
        source=TALEB,
        choices=("published", "cube"),
    )
    keep_grid: bool = setting(
        True,
        "Only rotations that map the grid to itself, given its spacing.",
        source="the spacing alone reveals the others",
    )
    copies: int = setting(2, "Rotated copies of each crop.", source=f"1 in {TALEB}", low=1)
    jitter_angle: float = setting(
        5.0, "Largest small angle about each axis, in degrees, on top of the rotation.", low=0, high=30
    )
    thick_slice_probability: float = setting(
        0.8,
        "Chance of a lower resolution along one axis, after the rotation.",
        source="hides the slice axis",
        low=0,
        high=1,
    )
    thick_slice: list[float] = setting([0.25, 0.8], "Range of the resolution that is left.", low=0.05, high=1, length=2)
    hidden_dims: list[int] = setting([256], "Widths of the head's layers.", low=1)
    reconstruction: float = setting(
        0.0,
        "Weight of restoring cut-out blocks beside the rotation, which trains the decoder, too. 0 leaves it out.",
        source=f"1 in {TANG}",
        low=0,
    )
    cut_out: float = setting(
        0.3, "Share of the blocks that are cut out, with reconstruction.", source=TANG, low=0.01, high=0.9
    )


class Rotation(EncoderMethod):
    """Classify the rotation of a crop's voxel grid.

    Beside the task a small classifier learns what the spacing alone reveals. Its accuracy is the number to compare
    with. Trains the encoder. Restoring cut-out blocks beside it, as Tang et al., "Self-Supervised Pre-Training of Swin
    Transformers for 3D Medical Image Analysis", CVPR 2022, is an option: networks often solve the rotation early.
    """

    name = "rotation"
    title = "Rotation"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Gidaris et al., ICLR 2018, arXiv:1803.07728"
    Settings = RotationSettings
    readable = Readable("accuracy", "Accuracy of the rotation")

    settings: RotationSettings

    def __init__(self, backbone: Backbone, settings: RotationSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry, decoder=settings.reconstruction > 0)
        self.rotations = allowed_rotations(settings, geometry)
        self.size, self.read_size = self.box(settings, geometry), self.region(settings, geometry)
        self.head = GridHead(channels=self.channels, hidden=settings.hidden_dims, outputs=len(self.rotations))
        self.spacing_classifier = SpacingClassifier(classes=len(self.rotations))

    @classmethod
    def output_channels(cls, settings: RotationSettings, geometry: DataGeometry) -> int | None:
        return geometry.channels if settings.reconstruction else None

    @classmethod
    def exchanged(cls, settings: RotationSettings, geometry: DataGeometry) -> np.ndarray:
        """Return which axes rotations exchange: (3, 3) bool."""
        return same_spacing(geometry.spacing) if settings.keep_grid else np.ones((3, 3), bool)

    @classmethod
    def box(cls, settings: RotationSettings, geometry: DataGeometry) -> tuple[int, int, int]:
        """Compute the crop's edges. They are equal along axes that rotations exchange."""
        return view_size(geometry, extent_of(settings.jitter_angle / 2), cls.exchanged(settings, geometry))

    @classmethod
    def crops(cls, settings: RotationSettings, geometry: DataGeometry) -> CropRequest:
        region, spatial = cls.region(settings, geometry), SpatialRange(geometry.spacing)
        # magnified alike along all axes: a single stretched axis would reveal the rotation
        return CropRequest((Crop(region, spatial, fit=True, centered=True, isotropic=True),))

    @classmethod
    def region(cls, settings: RotationSettings, geometry: DataGeometry) -> Triple:
        """Compute the region to read.

        It is equal along axes with equal edges of the crop. Where nothing rotates along an axis, as along that of thick
        slices, it has the crop's edge: a larger one could center the crop between two slices, which would be averaged.
        """
        box = cls.box(settings, geometry)
        region = region_size(geometry, box, extent_of(settings.jitter_angle))
        region = triple(min(r for r, b in zip(region, box, strict=True) if b == edge) for edge in box)
        about = SpatialRange(geometry.spacing).turning_axes()
        # a rotation about another axis moves voxels along this one, or along one that it is exchanged with
        moved = cls.exchanged(settings, geometry) @ (about.sum() - about)
        return triple(r if moves else b for r, b, moves in zip(region, box, moved, strict=True))

    def clipped_modules(self) -> list[nn.Module]:
        """Clip the spacing classifier's gradient apart from the task's."""
        task = [module for module in self.children() if module is not self.spacing_classifier]
        return [nn.ModuleList(task), self.spacing_classifier]

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` (B, N, C, D, H, W) and ``rotation`` (B, N).

        With reconstruction also ``target``, the image before blocks were cut out, and ``weight``, 1 in these blocks.
        """
        s, spacing, copies = self.settings, self.geometry.spacing, self.settings.copies
        label = random.integers(0, len(self.rotations) - 1, (copies,))
        angles = random.uniform(-s.jitter_angle, s.jitter_angle, (copies, 3)).numpy()
        axis = random.integers(0, 2, (copies,))
        zoom = random.uniform(s.thick_slice[0], s.thick_slice[1], (copies,))
        zoom = torch.where(random.chance(s.thick_slice_probability, (copies,)), zoom, torch.ones(()))
        # thick slices rotate in their plane alone, as in nnU-Net
        free = SpatialRange(spacing).turning_axes()
        # the small rotation is one of the rotated crop, so it reveals nothing; one resampling does both
        boxes = []
        for b, box in enumerate(batch.boxes[0]):
            for copy in range(copies):
                matrix = self.rotations[label[b, copy]] @ rotation_matrix(angles[b, copy] * free, spacing)
                boxes.append(subview(box, self.read_size, matrix, view_size=self.size))
        crops, _ = crop_batch(boxes, self.size, random.device)
        images = crops.unflatten(0, (-1, copies))
        draw = IntensityDraw.draw(
            s.intensity, random, images.shape[2], spacing, views=copies, masked=self.geometry.masked
        )
        draw.apply(images)
        simulate_thick_slices(crops, axis.flatten(), zoom.flatten())
        views = {"image": images, "rotation": to_device(label, random.device)}
        if s.reconstruction:
            block = [max(1, edge // 4) for edge in self.size]
            masks = [draw_block_mask(random, self.size, block, s.cut_out) for _ in range(copies)]
            mask = torch.stack(masks, 1)[:, :, None]
            views |= {"image": images * ~mask, "target": images, "weight": mask.expand_as(images).to(images.dtype)}
        return views

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``accuracy``, ``chance``, ``spacing_accuracy`` and health; (B,) each."""
        image, label = views["image"], views["rotation"]
        features, restored = self._encode(views)
        loss, accuracy = classification(self.head(features), label)
        logits = self.spacing_classifier(image.flatten(0, 1)).unflatten(0, label.shape)
        spacing_loss, spacing_accuracy = classification(logits, label)
        # the classifier learns beside the task without changing the value of its loss
        loss = loss + spacing_loss - spacing_loss.detach()
        measures = {"accuracy": accuracy, "spacing_accuracy": spacing_accuracy}
        if restored is not None:
            target, weight = views["target"].flatten(0, 1), views["weight"].flatten(0, 1)
            error = squared_error(restored, target, weight)
            loss = loss + self.settings.reconstruction * error.unflatten(0, label.shape).mean(1)
            explained = explained_variance(error, target, weight).unflatten(0, label.shape)
            measures["explained_variance"] = explained.nanmean(1)
        return self.result(loss, features, 1 / len(self.rotations), **measures)

    def check_validation(self, measures: dict[str, float]) -> ValidationCheck:
        """Tell when the rotation is recognized in nearly all crops."""
        if measures["accuracy"] < SOLVED:
            return ValidationCheck()
        solved = f"{measures['accuracy']:.2f} of the rotations are recognized, so more steps teach the encoder little"
        if not self.settings.reconstruction:
            solved += ". To learn on, set rotation.reconstruction=1, or take another method"
        return ValidationCheck(solved=solved)

    def _encode(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return features (B, N, 8 F) and, with reconstruction, the restored crops (B N, C, D, H, W)."""
        if not self.settings.reconstruction:
            return self.encode(views["image"]), None
        maps, restored = self.backbone.features_and_output(views["image"].flatten(0, 1))
        return grid_features(maps[-1]).unflatten(0, views["rotation"].shape), restored

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        predicted = self.head(self.encode(views["image"][:1]))[0].argmax(-1).tolist()
        rows = []
        for image, right, guess in zip(views["image"][0, :, 0], views["rotation"][0].tolist(), predicted, strict=True):
            true, guessed = self.rotations[right], self.rotations[guess]
            rows.append(
                [
                    Panel(f"rotated by {rotation_name(true)} (input)", image),
                    Panel(f"rotated back by the prediction, {rotation_name(guessed)}", rotate_back(image, guessed)),
                    Panel("rotated back by the truth (target)", rotate_back(image, true)),
                ]
            )
        return rows


class SpacingClassifier(nn.Module):
    """Classify from roughness alone, without encoder gradient."""

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers([3, 32, classes]))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, classes)."""
        return self.layers(roughness(image.detach().float()))


def roughness(image: Tensor) -> Tensor:
    """Measure the mean difference of neighbors along each axis: (B, C, D, H, W) -> (B, 3).

    The values are logarithms with zero mean over the axes. An axis with thick slices is rough. A blurred axis is
    smooth, and so is an axis of one voxel.
    """
    steps = [
        image.diff(dim=axis).abs().mean((1, 2, 3, 4)) if image.shape[axis] > 1 else image.new_zeros(len(image))
        for axis in (2, 3, 4)
    ]
    logarithms = torch.stack(steps, 1).clamp_min(1e-6).log()
    return logarithms - logarithms.mean(1, keepdim=True)


def extent_of(angle: float) -> float:
    """Compute a rotated cube's extent as a multiple of its edge. The angle in degrees is about each axis."""
    return 1 + 2 * math.sin(math.radians(angle))


def allowed_rotations(settings: RotationSettings, geometry: DataGeometry) -> list[np.ndarray]:
    """List the rotation classes of a grid.

    10 or 24 on isotropic grids, 6 or 8 with one odd axis, 4 with three spacings.
    """
    rotations = published_rotations() if settings.rotations == "published" else cube_group()
    return grid_rotations(rotations, geometry.spacing) if settings.keep_grid else rotations
