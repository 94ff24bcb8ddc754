"""VolumeFusion: segment a fused image into the levels at which a foreground crop was mixed in.

Wang et al., "MIS-FM", arXiv 2306.16925, and "Volume Fusion-based Self-Supervised Pretraining for 3D Medical Image
Segmentation", IEEE Transactions on Image Processing 34:6041, 2025.

B batch, C channel, D H W voxels, K levels above the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.dense import IGNORE, deep_supervision_weights, downsample_labels, hard_dice
from nnssl_ext.losses.fused import dice_cross_entropy
from nnssl_ext.methods.base import DataGeometry, Method, OptimizerRecipe, Readable
from nnssl_ext.methods.common import SharedSettings
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.cpu.chunks import sample_chunks, scratch
from nnssl_ext.views.fusion import MAX_BOXES, BoxLayout, GridLayout, fuse
from nnssl_ext.views.intensity import remap_percentiles
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import crop_batch

ARXIV, TIP = "arXiv 2306.16925", "IEEE TIP 34:6041"


@dataclass(frozen=True)
class VolumeFusionSettings(SharedSettings):
    """Settings of VolumeFusion."""

    levels: int = setting(4, "K. The foreground's share is 0, 1/K, ..., 1.", source=ARXIV, low=1, high=254)
    foreground_case: str = setting(
        "other",
        "Foreground from another case, or from the same case.",
        source=ARXIV,
        choices=("other", "same"),
    )
    layout: str = setting("boxes", "Overlapping boxes, or a grid of blocks.", source=ARXIV, choices=("boxes", "grid"))
    boxes: list[int] = setting([10, 40], "Number of boxes.", source=ARXIV, low=1, high=MAX_BOXES, length=2)
    box_edge: list[float] = setting(
        [0.0625, 0.625],
        "Range of a box's edge, as a share of the crop's edge.",
        source=ARXIV,
        low=0,
        high=1,
        length=2,
    )
    min_box_edge: int = setting(4, "Least box edge in voxels of the finest axis.", source=f"8 in {ARXIV}", low=1)
    block_edge: list[int] = setting(
        [8, 32],
        "Range of the edge of a grid's blocks, in voxels of the finest axis.",
        source=TIP,
        low=1,
        length=2,
    )
    foreground_share: float = setting(0.7, "Share of a grid's blocks that are foreground.", source=TIP, low=0, high=1)
    ignore_below: float = setting(
        0.05,
        "Voxels whose two sources differ by less, in normalized intensities, are ignored. 0 keeps all.",
        source="where both crops are alike, as in air, the level is undecidable",
        low=0,
    )
    dice_weight: float = setting(
        0.5, "Weight of the Dice loss. The cross-entropy has the rest.", source=ARXIV, low=0, high=1
    )
    remap: str = setting(
        "none",
        "Intensities as the plans normalize them, or percentiles to [0, 1].",
        choices=("none", "percentile"),
    )


class VolumeFusion(Method):
    """Segment X = a F + (1 - a) B into the K + 1 levels of a in {0, 1/K, ..., 1}.

    F is a foreground crop, B a background crop, and a is constant in boxes or blocks. The loss is Dice and
    cross-entropy with deep supervision. Trains encoder and decoder. Wang et al., IEEE TIP 34:6041, 2025.
    """

    name = "volume_fusion"
    title = "VolumeFusion"
    citation = "Wang et al., IEEE Transactions on Image Processing 34:6041, 2025, doi:10.1109/TIP.2025.3610249"
    Settings = VolumeFusionSettings
    readable = Readable("fusion_dice", "Dice of the fusion levels")

    settings: VolumeFusionSettings

    @classmethod
    def output_channels(cls, settings: VolumeFusionSettings, geometry: DataGeometry) -> int:
        return settings.levels + 1

    @classmethod
    def crops(cls, settings: VolumeFusionSettings, geometry: DataGeometry) -> CropRequest:
        spatial = settings.spatial(geometry)
        return CropRequest(
            (
                Crop(geometry.crop_size, spatial),
                Crop(geometry.crop_size, spatial, other_case=settings.foreground_case == "other"),
            )
        )

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.recipe(1e-3)

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` (B, C, D, H, W) and ``level`` (B, D, H, W) uint8 with ``IGNORE``."""
        s, size, device = self.settings, self.geometry.crop_size, random.device
        channels = len(batch.boxes[0][0].data)
        draws = [IntensityDraw.draw(s.intensity, random, channels, self.geometry.spacing) for _ in batch.boxes]
        level = self._draw_levels(random)
        image = torch.empty((len(random), channels, *size), device=device)
        for samples in sample_chunks(image):
            levels = level[samples]
            background, foreground = image[samples], scratch(image[samples].shape, device)
            valid = []
            for crop, boxes, draw in zip((background, foreground), batch.boxes, draws, strict=True):
                _, inside = crop_batch(boxes[samples], size, device, out=crop)
                if s.remap == "percentile":
                    remap_percentiles(crop)
                draw.of(samples).apply(crop)
                if inside is not None:
                    crop.mul_(inside)
                    valid.append(inside)
            fuse(foreground, background, levels, s.levels, s.ignore_below)
            for inside in valid:
                levels.masked_fill_(~inside[:, 0], IGNORE)
        return {"image": image, "level": level}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``, ``dice_loss`` and ``cross_entropy``. In evaluation also ``fusion_dice``. Each is (B,)."""
        outputs = self.network(views["image"])
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        loss = dice_total = entropy_total = views["image"].new_zeros(len(views["image"]), dtype=torch.float32)
        for output, weight in zip(outputs, deep_supervision_weights(len(outputs)), strict=True):
            if not weight:
                # keeps the coarsest head in the graph: DDP waits for every parameter's gradient
                loss = loss + 0.0 * output.float().mean((1, 2, 3, 4))
                continue
            dice, entropy = dice_cross_entropy(output, downsample_labels(views["level"], output.shape[2:]))
            dice_total, entropy_total = dice_total + weight * dice, entropy_total + weight * entropy
        mix = self.settings.dice_weight
        loss = loss + mix * dice_total + (1 - mix) * entropy_total
        result = {"loss": loss, "dice_loss": dice_total.detach(), "cross_entropy": entropy_total.detach()}
        if not self.training:
            result["fusion_dice"] = hard_dice(outputs[0], views["level"])
        return result

    def _draw_levels(self, random: BatchRandom) -> Tensor:
        """Draw and paint the level of every voxel: (B, D, H, W) uint8."""
        s, size = self.settings, self.geometry.crop_size
        # limits in voxels hold for the finest axis; a thick axis takes fewer voxels
        anisotropy = [spacing / min(self.geometry.spacing) for spacing in self.geometry.spacing]
        layout: BoxLayout | GridLayout
        if s.layout == "boxes":
            min_edge = [max(1, round(s.min_box_edge / ratio)) for ratio in anisotropy]
            layout = BoxLayout.draw(random, size, s.levels, sorted(s.boxes), sorted(s.box_edge), min_edge)
        else:
            edges = [[max(1, round(edge / ratio)) for edge in sorted(s.block_edge)] for ratio in anisotropy]
            layout = GridLayout.draw(random, size, s.levels, edges, s.foreground_share)
        # boxes are painted with doubles, which mps lacks
        canvas = torch.device("cpu") if random.device.type == "mps" else random.device
        return layout.paint(size, canvas).to(random.device)
