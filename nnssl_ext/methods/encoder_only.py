"""What objectives on the encoder alone share: the frozen decoder, a vector per crop or patch, health.

B batch, N crops or patches of a sample, C channel, D H W voxels, F features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.losses.health import effective_rank, feature_deviation
from nnssl_ext.methods.base import DataGeometry, Method
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import grid_features
from nnssl_ext.views.random import to_device


class EncoderMethod(Method):
    """An objective on the encoder's features; the decoder keeps its initial values and is written with them.

    Args:
        backbone: The network.
        settings, geometry: As for every method.
        stages: Encoder stages that are read, and trained; None for all.
    """

    deep_supervision = False

    def __init__(self, backbone: Backbone, settings: Any, geometry: DataGeometry, *, stages: int | None = None) -> None:
        super().__init__(backbone, settings, geometry)
        backbone.train_encoder_only(stages)
        self.stages = stages
        self.channels = backbone.channels[: stages or None][-1]

    def encode(self, crops: Tensor) -> Tensor:
        """Octant means of the deepest map that is read, all crops in one pass: (B, N, C, D, H, W) -> (B, N, 8 F)."""
        features = self.backbone.features(crops.flatten(0, 1), self.stages)[-1]
        return grid_features(features).unflatten(0, crops.shape[:2])

    def health(self, features: Tensor, index: Tensor) -> dict[str, Tensor]:
        """``feature_deviation`` and ``effective_rank`` of (B, N, F) over the global batch, each (B,)."""
        gathered = gather_samples(features, index)[0].flatten(0, 1)
        measures = {"feature_deviation": feature_deviation(gathered), "effective_rank": effective_rank(gathered)}
        return {name: value.expand(len(features)) for name, value in measures.items()}


def classification(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of each sample: (B, N, classes), (B, N) -> (B,) twice."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    right = (logits.argmax(-1) == target).float().mean(1)
    return loss.view(target.shape).mean(1), right


def sample_index(indices: list[int], device: torch.device) -> Tensor:
    """(B,) int64 global sample indices, for what depends on the global batch."""
    return to_device(torch.tensor(indices), device)
