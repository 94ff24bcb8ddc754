"""Pull views of a crop together, and crops apart.

Dosovitskiy et al., "Discriminative Unsupervised Feature Learning with Exemplar Convolutional Neural Networks", TPAMI
2016. As a triplet loss in 3-D: Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv
2006.03829.

B batch (G over all processes), C channel, D H W voxels, E embedding. A sample is three images: anchor, positive, and a
crop of another case. Negatives are the other samples' images too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.losses.triplet import plain_triplet, semi_hard_triplet, squared_distances
from nnssl_ext.losses.vicreg import vicreg
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe, Readable
from nnssl_ext.methods.common import SharedSettings, region_size, view_size
from nnssl_ext.methods.encoder_only import EncoderMethod
from nnssl_ext.methods.panels import Panel, axial
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import GridHead
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import CustomIntensitySettings, IntensityDraw, default
from nnssl_ext.views.layout import standardize
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.spatial import SourceBox, SpatialRange, crop_batch, on_voxels, subview

TALEB = "Taleb et al. 2020"
#: Extent of a view rotated by up to 15 degrees about each axis, as a multiple of its edge: median, and largest.
MEDIAN_EXTENT, MAX_EXTENT = 1.25, 1.5
#: Nearest images in a row of the picture.
NEAREST = 6


@dataclass(frozen=True)
class ExemplarIntensitySettings(CustomIntensitySettings):
    """Stronger views, so that no histogram identifies a crop."""

    gamma_probability: float = default("gamma_probability", 0.8)
    noise_probability: float = default("noise_probability", 0.3)
    blur_probability: float = default("blur_probability", 0.2, source="nnU-Net")
    histogram_probability: float = default("histogram_probability", 0.8, source="3DINO")


@dataclass(frozen=True)
class ExemplarSettings(SharedSettings):
    """Settings of exemplar."""

    flip: float = setting(0.0, "Chance of a mirror, per axis and view.", low=0, high=1)
    rot90: float = setting(0.0, "Chance of quarter turns in a plane of equal edges and spacing.", low=0, high=1)
    affine: float = setting(1.0, "Chance of a rotation and zoom, per view.", low=0, high=1)
    intensity: ExemplarIntensitySettings = field(default_factory=ExemplarIntensitySettings)
    standardize: bool = setting(True, "Zero mean and unit deviation per view.")
    objective: str = setting(
        "triplet",
        "triplet, or vicreg, which needs no negatives and ignores margin, mining and normalize.",
        source="VICReg, Bardes et al. 2022, for batches of 2 to 9",
        choices=("triplet", "vicreg"),
    )
    margin: float = setting(1.0, "Margin in squared distance.", source=TALEB, low=0.01)
    mining: str = setting(
        "semi_hard",
        "The negative: semi-hard among crops of other cases in the batch, or the given crop.",
        source=f"given in {TALEB}",
        choices=("semi_hard", "given"),
    )
    shared_head: bool = setting(
        True,
        "One head for all three images. With three heads the loss falls without the encoder.",
        source=f"three in {TALEB}",
    )
    normalize: bool = setting(True, "Embeddings on the unit sphere.", source="FaceNet")
    clean_positive: bool = setting(
        False,
        "The positive is not augmented, which alone distinguishes it from the anchor.",
        source=f"true in {TALEB}",
    )
    hidden_dims: list[int] = setting([256], "Widths of the head's layers.", low=1)
    embedding_dim: int = setting(128, "Width of an embedding.", low=1)


class Exemplar(EncoderMethod):
    """Pull two views together and other cases away.

    A triplet loss with semi-hard negatives on embeddings of the encoder. Trains the encoder.
    """

    name = "exemplar"
    title = "Exemplar"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Dosovitskiy et al., TPAMI 2016, arXiv:1406.6909"
    Settings = ExemplarSettings
    readable = Readable("triplet_accuracy", "Negatives that are farther than the positive")
    min_batch_size = 2  # negatives are chosen from the batch
    picture_samples = 4

    settings: ExemplarSettings

    def __init__(self, backbone: Backbone, settings: ExemplarSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        self.size = view_size(geometry, MEDIAN_EXTENT)
        self.region = region_size(geometry, self.size, MAX_EXTENT)
        self.heads = nn.ModuleList(
            GridHead(channels=self.channels, hidden=settings.hidden_dims, outputs=settings.embedding_dim)
            for _ in range(1 if settings.shared_head else 3)
        )

    @classmethod
    def crops(cls, settings: ExemplarSettings, geometry: DataGeometry) -> CropRequest:
        region = region_size(geometry, view_size(geometry, MEDIAN_EXTENT), MAX_EXTENT)
        crop = Crop(region, SpatialRange(geometry.spacing), fit=True)
        return CropRequest((crop, Crop(crop.size, crop.spatial, other_case=True, fit=True)))

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.recipe(3e-4, self.backbone)

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` (B, 3, C, D, H, W), and hashes of the images' ``case`` (B, 3)."""
        own, other = batch.boxes
        case = [[zlib.crc32(box.case.encode()) for box in row] for row in (own, own, other)]
        return {
            "image": self._images(own, other, random),
            "case": to_device(torch.tensor(case), random.device).T,
        }

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``triplet_accuracy``, ``chance`` and health. Each is (B,)."""
        embedded = self.embed(self.encode(views["image"]))
        anchor, positive, negative = embedded.unbind(1)
        gathered, _ = gather_samples(embedded, self.geometry.batch_size)  # (G, 3, E)
        cases, _ = gather_samples(views["case"], self.geometry.batch_size)
        candidates = gathered.flatten(0, 1)
        allowed = views["case"][:, :1] != cases.flatten()[None]  # (B, 3 G)
        margin = self.settings.margin
        if self.settings.objective == "vicreg":
            loss = vicreg(anchor, positive, candidates)
        elif self.settings.mining == "given":
            loss = plain_triplet(anchor, positive, negative, margin)
        else:
            loss = (
                semi_hard_triplet(anchor, positive, candidates, allowed, margin)
                + semi_hard_triplet(positive, anchor, candidates, allowed, margin)
            ) / 2
        measures = {}
        if not self.training:
            near = ((anchor.float() - positive.float()) ** 2).sum(1, keepdim=True)
            farther = (squared_distances(anchor, candidates) > near) & allowed
            measures["triplet_accuracy"] = farther.sum(1) / allowed.sum(1)
        return self.result(loss, embedded, 0.5, **measures)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        embedded = self.embed(self.encode(views["image"])).flatten(0, 1)  # (3 B, E)
        images, cases = axial(views["image"]).flatten(0, 1), views["case"].flatten()
        rows = []
        for anchor in range(0, len(images), 3):
            distances = squared_distances(embedded[anchor : anchor + 1], embedded)[0]
            distances[anchor] = torch.inf
            row = [Panel("anchor\n", images[anchor])]
            for place in distances.argsort()[: min(NEAREST, len(images) - 1)].tolist():
                other = "same case" if cases[place] == cases[anchor] else "other case"
                what = "positive" if place == anchor + 1 else other
                row.append(Panel(f"{what}\n{distances[place]:.3f}", images[place]))
            rows.append(row)
        return rows

    def embed(self, features: Tensor) -> Tensor:
        """(B, 3, 8 F) -> (B, 3, E)."""
        if self.settings.shared_head:
            embedded = self.heads[0](features)
        else:
            embedded = torch.stack([head(features[:, place]) for place, head in enumerate(self.heads)], 1)
        plain = self.settings.objective == "vicreg" or not self.settings.normalize
        return embedded.float() if plain else F.normalize(embedded.float(), dim=-1)

    def _images(self, own: list[SourceBox], other: list[SourceBox], random: BatchRandom) -> Tensor:
        """Cut and augment anchor, positive and crop of another case: (B, 3, C, D, H, W)."""
        size, spacing, clean = self.size, self.geometry.spacing, self.settings.clean_positive
        spatial = self.settings.spatial(self.geometry)
        boxes = []
        for b, (mine, others) in enumerate(zip(own, other, strict=True)):
            generator = random.generator(b)
            for place, box in enumerate((mine, mine, others)):
                untouched = clean and place == 1
                matrix = np.eye(3) if untouched else spatial.draw(generator, size)
                where = np.zeros(3) if untouched else generator.uniform(-1, 1, 3)
                view = subview(box, self.region, matrix, where, view_size=size, isotropic=False)
                boxes.append(on_voxels(view, size) if untouched else view)
        crops, _ = crop_batch(boxes, size, random.device)
        images = crops.unflatten(0, (len(own), 3))
        original = images[:, 1].clone() if clean else None
        draw = IntensityDraw.draw(
            self.settings.intensity, random, images.shape[2], spacing, views=3, masked=self.geometry.masked
        )
        draw.apply(images)
        if original is not None:
            images[:, 1] = original
        return standardize(images) if self.settings.standardize else images
