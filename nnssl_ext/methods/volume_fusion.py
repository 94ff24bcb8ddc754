"""Segment a fused image into its mixing levels.

Wang et al., "MIS-FM", arXiv 2306.16925, and "Volume Fusion-based Self-Supervised Pretraining for 3D Medical Image
Segmentation", IEEE Transactions on Image Processing 34:6041, 2025.

B batch, C channel, D H W voxels, K levels above the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.dense import IGNORE, deep_supervision_weights, downsample_labels, hard_dice
from nnssl_ext.losses.fused import dice_cross_entropy
from nnssl_ext.methods.base import DataGeometry, Method, Readable
from nnssl_ext.methods.common import SharedSettings
from nnssl_ext.methods.panels import Panel
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw, IntensitySettings, keep_zero, outside_of
from nnssl_ext.views.cpu.chunks import sample_chunks, scratch
from nnssl_ext.views.fusion import BoxLayout, GridLayout, MissingNoise, fuse
from nnssl_ext.views.intensity import remap_percentiles
from nnssl_ext.views.random import BatchRandom, shuffle_voxels
from nnssl_ext.views.spatial import crop_batch

ARXIV, TIP = "arXiv 2306.16925", "IEEE TIP 34:6041"
#: Views that change local noise or sharpness, and so could reveal the level of a crop.
FILTERS = ("noise", "blur", "low_resolution", "sharpen", "gibbs")


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
    boxes: list[int] = setting([10, 40], "Number of boxes.", source=ARXIV, low=1, high=52, length=2)
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
    whole_blocks: bool = setting(
        False, "A grid of whole blocks only. The border that is left is background.", source=f"true in {TIP}"
    )
    degrade_fused: bool = setting(
        True,
        "Noise, blur, low resolution and ringing of the fused image instead of each crop.",
        source="filters of one crop reveal its level",
    )
    match_noise: bool = setting(
        True,
        "Add noise where the fusion lowers it.",
        source="noise of a F + (1 - a) B has variance a^2 + (1 - a)^2",
    )
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
    cross-entropy with deep supervision. Trains encoder and decoder.
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
        background = Crop(geometry.crop_size, settings.spatial(geometry))
        # interpolation smooths: where one crop alone is resampled, its sharpness reveals the level
        other = settings.foreground_case == "other"
        return CropRequest((background, replace(background, other_case=other, resampled_alike=True)))

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` (B, C, D, H, W) and ``level`` (B, D, H, W) uint8 with ``IGNORE``.

        In evaluation also ``shuffled``, the same fusion of the crops' shuffled voxels, and its ``shuffled_level``.
        """
        s, size, spacing = self.settings, self.geometry.crop_size, self.geometry.spacing
        channels = len(batch.boxes[0][0].data)
        of_crops, of_fused = split_off(s.intensity, FILTERS) if s.degrade_fused else (s.intensity, None)
        of_crops, of_both = split_off(of_crops, ("invert",))  # one inverted crop would reveal the level
        masked = [channel for channel, kept in enumerate(self.geometry.masked) if kept]
        of, kept = (random, channels, spacing), self.geometry.masked
        draws = [IntensityDraw.draw(of_crops, *of, masked=kept) for _ in batch.boxes]
        inversion = IntensityDraw.draw(of_both, *of, masked=kept)
        filters = IntensityDraw.draw(of_fused, *of, masked=kept) if of_fused else None
        level = self._draw_levels(random)
        image = torch.empty((len(random), channels, *size), device=random.device)
        views = {"image": image, "level": level}
        if not self.training:
            views |= {"shuffled": torch.empty_like(image), "shuffled_level": level.clone()}
        for samples in sample_chunks(image):
            own = random.of(samples)
            background, foreground = image[samples], scratch(image[samples].shape, random.device)
            valid = []
            for crop, boxes, draw in zip((background, foreground), batch.boxes, draws, strict=True):
                _, inside = crop_batch(boxes[samples], size, random.device, out=crop)
                if s.remap == "percentile":
                    remap_percentiles(crop)
                draw.of(samples).apply(crop)
                inversion.of(samples).apply(crop)
                if inside is not None:
                    crop.mul_(inside)
                    valid.append(inside)
            pairs = [(foreground, background, level[samples])]
            if not self.training:  # first, since fusing changes the background
                front, back = shuffle_voxels(foreground, own), shuffle_voxels(background, own)
                pairs.insert(0, (front, views["shuffled"][samples].copy_(back), views["shuffled_level"][samples]))
            for front, fused, target in pairs:
                outside = outside_of((front, fused), masked)
                self._fuse(front, fused, target, own)
                if filters is not None:
                    filters.of(samples).apply(fused)
                keep_zero(fused, masked, outside)
                for inside in valid:
                    fused.mul_(inside)
                    target.masked_fill_(~inside[:, 0], IGNORE)
        return views

    def _fuse(self, foreground: Tensor, background: Tensor, level: Tensor, random: BatchRandom) -> Tensor:
        """Fuse within ``background``, with the noise of an unmixed crop."""
        s = self.settings
        sources = foreground, background
        missing = MissingNoise(*sources, s.levels, random, self.geometry.masked) if s.match_noise else None
        return fuse(foreground, background, level, s.levels, s.ignore_below, missing=missing)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``, ``dice_loss`` and ``cross_entropy``, each (B,).

        In evaluation also ``fusion_dice`` and, as its control, ``shuffled_dice`` on shuffled voxels.
        """
        outputs = self._outputs(views["image"])
        loss = dice_total = entropy_total = views["image"].new_zeros(len(views["image"]), dtype=torch.float32)
        for output, weight in zip(outputs, deep_supervision_weights(len(outputs)), strict=True):
            if not weight:
                # keeps the coarsest head in the graph: DDP waits for every parameter's gradient
                # it is never trained, and in float16 its output may overflow
                loss = loss + 0.0 * output.float().nan_to_num(0.0, 0.0, 0.0).mean((1, 2, 3, 4))
                continue
            dice, entropy = dice_cross_entropy(output, downsample_labels(views["level"], output.shape[2:]))
            dice_total, entropy_total = dice_total + weight * dice, entropy_total + weight * entropy
        mix = self.settings.dice_weight
        loss = loss + mix * dice_total + (1 - mix) * entropy_total
        result = {"loss": loss, "dice_loss": dice_total.detach(), "cross_entropy": entropy_total.detach()}
        if not self.training:
            result["fusion_dice"] = hard_dice(outputs[0], views["level"])
            result["shuffled_dice"] = hard_dice(self._outputs(views["shuffled"])[0], views["shuffled_level"])
        return result

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        level = views["level"][0]
        known = level.float().masked_fill(level == IGNORE, torch.nan)
        predicted = self._outputs(views["image"][:1])[0][0].argmax(0)
        return [
            [
                Panel("fused input", views["image"][0, 0]),
                Panel("level of the foreground (target)", known, "levels"),
                Panel("predicted level", predicted, "levels"),
            ]
        ]

    def _outputs(self, image: Tensor) -> Sequence[Tensor]:
        """Return all outputs, the finest first."""
        outputs = self.backbone.output(image)
        return outputs if isinstance(outputs, (list, tuple)) else [outputs]

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
            layout = GridLayout.draw(random, size, s.levels, edges, s.foreground_share, s.whole_blocks)
        return layout.paint(size, random.device)


def split_off(settings: IntensitySettings, names: Sequence[str]) -> tuple[IntensitySettings, IntensitySettings]:
    """Split intensity views into all but those of these names, and those alone."""
    chances = {f.name for f in fields(settings) if f.name.endswith("_probability")}
    chances -= {name for name in chances if name.endswith("_channel_probability")}
    named = {f"{name}_probability" for name in names}
    without: dict[str, Any] = dict.fromkeys(named, 0.0)
    alone: dict[str, Any] = dict.fromkeys(chances - named, 0.0)
    return replace(settings, **without), replace(settings, **alone)
