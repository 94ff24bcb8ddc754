"""Shared parts of objectives that restore a crop.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnssl_ext.data.crops import Crop, CropRequest
from nnssl_ext.losses.reconstruction import explained_variance, squared_error
from nnssl_ext.methods.base import DataGeometry, Method
from nnssl_ext.networks.base import Backbone


class RestoringMethod(Method):
    """Restore a crop with the whole network.

    ``views`` returns ``image``, ``target`` and ``weight``, 1 for voxels that count. In evaluation also ``shuffled`` and
    ``shuffled_target``, the same of the crop's shuffled voxels. Each is (B, C, D, H, W).
    """

    deep_supervision = False

    def __init__(self, backbone: Backbone, settings: Any, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        backbone.set_deep_supervision(False)
        backbone.freeze_coarse_heads()

    @classmethod
    def output_channels(cls, settings: Any, geometry: DataGeometry) -> int:
        return geometry.channels

    @classmethod
    def crops(cls, settings: Any, geometry: DataGeometry) -> CropRequest:
        return CropRequest((Crop(geometry.crop_size, settings.spatial(geometry)),))

    def restore(self, image: Tensor, views: dict[str, Tensor]) -> Tensor:
        """Restore an image, one of the ``views``: (B, C, D, H, W)."""
        return self.backbone.output(image)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``, the mean squared error: (B,).

        In evaluation also ``explained_variance`` and, as its control, ``shuffled_variance`` on shuffled voxels.
        """
        target, weight = views["target"], views["weight"]
        error = squared_error(self.restore(views["image"], views), target, weight)
        result = {"loss": error}
        if not self.training:
            shuffled = squared_error(self.restore(views["shuffled"], views), views["shuffled_target"], weight)
            result["explained_variance"] = explained_variance(error, target, weight)
            result["shuffled_variance"] = explained_variance(shuffled, views["shuffled_target"], weight)
        return result
