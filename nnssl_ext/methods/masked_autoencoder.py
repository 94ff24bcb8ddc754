"""Predict the voxels of masked blocks.

It is the control for claims about the other methods, and the strongest published objective for segmentation with
residual encoders. He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Convolutional and 3-D:
Wald et al., arXiv 2410.23132 and 2412.17041.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.errors import UserError
from nnssl_ext.losses.reconstruction import MIN_VARIANCE
from nnssl_ext.methods.base import DataGeometry, Readable
from nnssl_ext.methods.common import SharedSettings
from nnssl_ext.methods.panels import Panel
from nnssl_ext.methods.restoring import RestoringMethod
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import TokenDecoder
from nnssl_ext.networks.visible_norms import VisibleNorms
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.masking import block_moments, draw_block_mask, expand_blocks, masked_blocks, visible_tokens
from nnssl_ext.views.random import BatchRandom, shuffle_voxels
from nnssl_ext.views.spatial import crop_batch

HE, WALD = "He et al. 2022", "arXiv 2410.23132"
#: Edge of a block in voxels of the finest axis.
EDGE = 16


@dataclass(frozen=True)
class MaskedAutoencoderSettings(SharedSettings):
    """Settings of the masked autoencoder."""

    mask_ratio: float = setting(0.75, "Share of masked blocks.", source=f"{HE}, {WALD}", low=0.01, high=0.99)
    block_size: list[int] | None = setting(
        None,
        "Edges of a block in voxels. null: along every axis the length of 16 voxels of the finest one, at most a "
        "quarter of the crop, and whole tokens on a vision transformer.",
        source=f"16 in {HE}, {WALD}",
        low=1,
        length=3,
    )
    visible_norms: bool = setting(
        False,
        "Instance norms take their statistics from visible voxels only.",
        source=f"masked voxels shift them; {WALD} uses sparse convolutions",
    )
    drop_masked_tokens: bool = setting(
        True,
        "Vision transformers encode visible tokens alone, a quarter of the cost. The mask token replaces the others.",
        source=HE,
    )
    decoder_depth: int = setting(
        2, "Transformer blocks behind the encoder where masked tokens are left out.", source=f"8 in {HE}", low=1
    )
    normalize_target: bool = setting(
        False, "Predict voxels normalized by their block's mean and deviation.", source=f"an option of {HE}"
    )


class MaskedAutoencoder(RestoringMethod):
    """Predict masked blocks from the visible voxels.

    The loss is the mean squared error over masked voxels. Trains encoder and decoder.
    """

    name = "masked_autoencoder"
    title = "Masked autoencoder"
    citation = "He et al., CVPR 2022, arXiv:2111.06377; Wald et al., CVPR 2025, arXiv:2410.23132"
    Settings = MaskedAutoencoderSettings
    readable = Readable("explained_variance", "Explained variance of masked voxels")

    settings: MaskedAutoencoderSettings

    def __init__(self, backbone: Backbone, settings: MaskedAutoencoderSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        token = backbone.strides[-1] if backbone.is_transformer else None
        self.block_size = settings.block_size or default_block(geometry, token)
        self.token = token if settings.drop_masked_tokens else None
        if self.token:
            backbone.train_mask_token()
            grid = [edge // step for edge, step in zip(geometry.crop_size, self.token, strict=True)]
            self.token_decoder = TokenDecoder(width=backbone.channels[-1], grid=grid, depth=settings.decoder_depth)
            self.visible_count = _visible_count(geometry.crop_size, self.block_size, self.token, settings.mask_ratio)
        self.visible = VisibleNorms(self.network) if settings.visible_norms else None

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``image`` with masked voxels at zero, ``target``, and ``weight`` 1 for target voxels.

        Each is (B, C, D, H, W). Zero is about the mean of normalized intensities, and nnU-Net's padding. In evaluation
        also ``shuffled``, the same crop with its voxels shuffled before they were masked, and ``shuffled_target``.
        Vision transformers also get ``tokens`` (B, V), the visible ones.
        """
        size = self.geometry.crop_size
        image, inside = crop_batch(batch.boxes[0], size, random.device)
        g = self.geometry
        IntensityDraw.draw(self.settings.intensity, random, g.channels, g.spacing, masked=g.masked).apply(image)
        mask = draw_block_mask(random, size, self.block_size, self.settings.mask_ratio)
        masked = mask[:, None]

        if inside is not None:
            image.mul_(inside)
        mean, variance = block_moments(image, self.block_size)
        weight = masked & expand_blocks(variance > MIN_VARIANCE, size, self.block_size)
        if inside is not None:
            weight = weight & inside
        target = self._target(image, mean, variance)
        views = {"image": image * ~masked, "target": target, "weight": weight.to(image.dtype)}
        if self.visible:
            views["visible"] = ~masked
        if self.token:
            views["tokens"] = visible_tokens(mask, self.token, self.visible_count)
        if not self.training:
            shuffled = shuffle_voxels(image, random)
            shuffled_target = self._target(shuffled, *block_moments(shuffled, self.block_size))
            views |= {"shuffled": shuffled * ~masked, "shuffled_target": shuffled_target}
        return views

    def _target(self, image: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the values to predict, from the moments of each block."""
        if not self.settings.normalize_target:
            return image
        deviation = variance.clamp_min(MIN_VARIANCE).sqrt()
        size, block = self.geometry.crop_size, self.block_size
        return (image - expand_blocks(mean, size, block)) / expand_blocks(deviation, size, block)

    def restore(self, image: Tensor, views: dict[str, Tensor]) -> Tensor:
        if self.visible:
            self.visible.mask = views["visible"]
        if not self.token:
            return self.backbone.output(image)
        return self.backbone.visible_output(image, views["tokens"], self.token_decoder)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        first = {name: value[:1] for name, value in views.items()}
        prediction, masked = self.restore(first["image"], first)[0, 0], views["weight"][0, 0] > 0
        target = views["target"][0, 0]
        return [
            [
                Panel("masked input", views["image"][0, 0]),
                Panel("prediction in masked blocks", torch.where(masked, prediction, target)),
                Panel("truth (target)", target),
            ]
        ]


def default_block(geometry: DataGeometry, token: Sequence[int] | None = None) -> list[int]:
    """Compute block edges of equal length in mm.

    They are 16 voxels of the finest axis, at most a quarter of the crop. With tokens the edges are the nearest whole
    tokens below, at least one, that divide the crop.
    """
    length = EDGE * min(geometry.spacing)
    block = [
        max(1, min(round(length / spacing), edge // 4))
        for spacing, edge in zip(geometry.spacing, geometry.crop_size, strict=True)
    ]
    if token is None:
        return block
    return [
        next((size for size in range(max(most // step, 1) * step, step, -step) if edge % size == 0), step)
        for most, step, edge in zip(block, token, geometry.crop_size, strict=True)
    ]


def _visible_count(size: Sequence[int], block: Sequence[int], token: Sequence[int], ratio: float) -> int:
    """Return the visible tokens of a sample, which must be equally many in all samples."""
    for edge, length, step in zip(size, block, token, strict=True):
        if length % step or edge % length:
            raise UserError(
                f"masked_autoencoder.block_size: expected multiples of the tokens {list(token)} that divide the crop "
                f"{list(size)}, got {list(block)}. Change it, or set drop_masked_tokens to false."
            )
    total = math.prod(edge // length for edge, length in zip(size, block, strict=True))
    return (total - masked_blocks(total, ratio)) * math.prod(a // b for a, b in zip(block, token, strict=True))
