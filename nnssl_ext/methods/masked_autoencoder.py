"""Masked autoencoder: predict the voxels of hidden input blocks with the whole network.

The control for every claim of the other methods, and the strongest published objective for segmentation with residual
encoders. He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; Wald et al., arXiv 2410.23132 and
2412.17041 (convolutional, 3-D).

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.methods.base import DataGeometry, Method, OptimizerRecipe, Readable
from nnssl_ext.methods.common import SharedSettings
from nnssl_ext.networks.base import Backbone
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.masking import block_moments, draw_block_mask, expand_blocks
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import crop_batch

HE, WALD = "He et al. 2022", "arXiv 2410.23132"
#: A block whose variance is lower shows nothing to predict.
LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class MaskedAutoencoderSettings(SharedSettings):
    """Settings of the masked autoencoder."""

    ratio: float = setting(0.75, "Share of the blocks that is hidden.", source=f"{HE}, {WALD}", low=0.01, high=0.99)
    block: list[int] | None = setting(
        None,
        "Block edges in voxels; null is an eighth of the crop's.",
        source="16 of 128 in both papers",
        low=1,
        length=3,
    )
    normalise_target: bool = setting(
        False, "Predict voxels normalised by their block's mean and deviation.", source=f"an option of {HE}"
    )


class MaskedAutoencoder(Method):
    """See the module's docstring."""

    name = "masked_autoencoder"
    title = "Masked autoencoder"
    citation = "He et al., CVPR 2022, arXiv:2111.06377; Wald et al., CVPR 2025, arXiv:2410.23132"
    Settings = MaskedAutoencoderSettings
    readable = Readable("explained_variance", "Explained variance of hidden voxels")
    deep_supervision = False

    settings: MaskedAutoencoderSettings

    def __init__(self, backbone: Backbone, settings: MaskedAutoencoderSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        backbone.set_deep_supervision(False)
        backbone.freeze_coarse_heads()
        self.block = settings.block or [max(1, round(edge / 8)) for edge in geometry.crop_size]

    @classmethod
    def output_channels(cls, settings: MaskedAutoencoderSettings, geometry: DataGeometry) -> int:
        return geometry.channels

    @classmethod
    def crops(cls, settings: MaskedAutoencoderSettings, geometry: DataGeometry) -> CropRequest:
        return CropRequest((Crop(geometry.crop_size, settings.spatial(geometry)),))

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.recipe(1e-3)

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """``image`` with hidden voxels at zero, ``target``, and ``weight`` 1 where a voxel is to be predicted.

        All (B, C, D, H, W). Zero is about the mean of normalised intensities, and nnU-Net's padding.
        """
        size = self.geometry.crop_size
        image, inside = crop_batch(batch.boxes[0], size, random.device)
        draw = IntensityDraw.draw(self.settings.intensity, random, image.shape[1], self.geometry.spacing)
        draw.apply(image, random)
        hidden = draw_block_mask(random, size, self.block, self.settings.ratio)[:, None]

        if inside is not None:
            image.mul_(inside)
        mean, variance = block_moments(image, self.block)
        weight = hidden & expand_blocks(variance > LEAST_VARIANCE, size, self.block)
        if inside is not None:
            weight = weight & inside
        target = image
        if self.settings.normalise_target:
            deviation = variance.clamp_min(LEAST_VARIANCE).sqrt()
            target = (image - expand_blocks(mean, size, self.block)) / expand_blocks(deviation, size, self.block)
        return {"image": image * ~hidden, "target": target, "weight": weight.to(image.dtype)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, the mean squared error of hidden voxels; in evaluation ``explained_variance``; each (B,)."""
        target, weight = views["target"], views["weight"]
        prediction = self.network(views["image"]).float()
        count = weight.sum((1, 2, 3, 4)).clamp_min(1)
        error = ((prediction - target) ** 2 * weight).sum((1, 2, 3, 4)) / count
        result = {"loss": error}
        if not self.training:
            # a network that answers the mean of the hidden voxels of each channel scores 0
            per_channel = weight.sum((2, 3, 4), keepdim=True).clamp_min(1)
            mean = (target * weight).sum((2, 3, 4), keepdim=True) / per_channel
            variance = ((target - mean) ** 2 * weight).sum((1, 2, 3, 4)) / count
            result["explained_variance"] = 1 - error / variance.clamp_min(LEAST_VARIANCE)
        return result
