"""Classify 2-D images as thin volumes.

Zhang et al., "Advancing 3D Medical Image Analysis with Variable Dimension Transform based Supervised 3D Pre-training",
arXiv 2201.01426.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.data.images import ImageFolder, ImageRequest
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.data.samples import SampleClasses
from nnssl_ext.errors import UserError
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe, Readable
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.methods.encoder_only import EncoderMethod
from nnssl_ext.methods.panels import Panel
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import VoxelHead
from nnssl_ext.settings import CommonSettings, setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.depth import DEVIATION, MEAN, colors_as_depth
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.spatial import crop_batch

ZHANG = "arXiv 2201.01426"
#: Classes before the folder of images is known, as many as in ImageNet.
UNKNOWN = SampleClasses(tuple(map(str, range(1000))), 0.001)


@dataclass(frozen=True)
class VariableDimensionTransformSettings(TrainingSettings):
    """Settings of the variable dimension transform."""

    area: list[float] = setting([0.2, 1.0], "Range of a crop's share of the image.", low=0.01, high=1, length=2)
    label_smoothing: float = setting(0.1, "Label smoothing.", source=ZHANG, low=0, high=0.9)
    momentum: float = setting(0.99, "Momentum of SGD.", source="nnU-Net", low=0, high=0.999)
    hidden_dim: int = setting(512, "Width of the per-voxel layer before pooling.", low=1)


class VariableDimensionTransform(EncoderMethod):
    """Classify labeled photographs with colors as slices.

    Every stride along the depth is one during pretraining. Afterwards the same weights run with the plan's strides,
    because a kernel does not depend on its stride. Supervised. Trains the encoder.
    """

    name = "variable_dimension_transform"
    title = "Variable dimension transform"
    citation = "Zhang et al., arXiv:2201.01426"
    Settings = VariableDimensionTransformSettings
    readable = Readable("accuracy", "Accuracy of the image's class")
    learns_from = "labeled 2-D images"
    picture_samples = 4

    settings: VariableDimensionTransformSettings

    def __init__(
        self, backbone: Backbone, settings: VariableDimensionTransformSettings, geometry: DataGeometry
    ) -> None:
        super().__init__(backbone, settings, geometry)
        # estimates of memory may come before the folder is known
        self.classes = geometry.classes or UNKNOWN
        backbone.drop_depth_strides()
        backbone.equalize_input_channels()
        self.head = VoxelHead(channels=self.channels, hidden=settings.hidden_dim, outputs=len(self.classes.names))

    @classmethod
    def check_backbone(cls, backbone: Backbone) -> None:
        backbone.drop_depth_strides()

    @classmethod
    def samples(cls, common: CommonSettings, index: CaseIndex) -> ImageFolder:
        if common.images is None:
            raise UserError(
                f"{cls.title} learns from labeled 2-D images: set nnssl_ext.images to a folder of them, "
                f"CLASS/IMAGE.png or .jpg (nnssl_ext plan ... images=FOLDER)"
            )
        return ImageFolder(Path(common.images))

    @classmethod
    def crops(cls, settings: VariableDimensionTransformSettings, geometry: DataGeometry) -> ImageRequest:
        height, width = geometry.crop_size[1:]
        return ImageRequest((height, width), (settings.area[0], settings.area[1]))

    def optimizer(self) -> OptimizerRecipe:
        return replace(super().optimizer(), momentum=self.settings.momentum)

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` (B, C, 3, H, W) with equal channels and ``label`` (B,)."""
        names = [box.case for box in batch.boxes[0]]
        size = self.geometry.crop_size[1:]
        pixels = crop_batch(batch.boxes[0], (1, *size), random.device)[0][:, :, 0]  # (B, 3, H, W)
        volume = (colors_as_depth(pixels, random) - MEAN) / DEVIATION
        # pixels have no spacing: they count as isotropic
        IntensityDraw.draw(self.settings.intensity, random, 1, (1.0, 1.0, 1.0)).apply(volume)
        label = [self.classes.names.index(name.split("/", 1)[0]) for name in names]
        return {
            "image": volume.expand(-1, self.geometry.channels, -1, -1, -1).contiguous(),
            "label": to_device(torch.tensor(label), random.device),
        }

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``accuracy``, ``chance`` and health. Each is (B,)."""
        features = self.backbone.features(views["image"])[-1]
        logits, pooled = self.head(features)
        loss = F.cross_entropy(
            logits.float(), views["label"], reduction="none", label_smoothing=self.settings.label_smoothing
        )
        accuracy = (logits.argmax(1) == views["label"]).float()
        return self.result(loss, pooled[:, None], self.classes.chance, accuracy=accuracy)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        predicted = self.head(self.backbone.features(views["image"])[-1])[0].argmax(1).tolist()
        names, rows = self.classes.names, []
        for image, right, guess in zip(views["image"][:, 0], views["label"].tolist(), predicted, strict=True):
            titles = [f"{names[right]}\nguess: {names[guess]}", *(f"slice {n + 1}\n" for n in range(1, len(image)))]
            rows.append([Panel(title, plane) for title, plane in zip(titles, image, strict=True)])
        return rows
