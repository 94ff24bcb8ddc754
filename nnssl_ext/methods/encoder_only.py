"""Shared parts of objectives that train the encoder alone.

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


class EncoderMethod(Method):
    """Train the encoder. The decoder keeps its initial values unless a term trains it.

    Args:
        stages: Encoder stages that are run and trained. None is all of them.
        decoder: Train the decoder and its finest output.
    """

    deep_supervision = False

    def __init__(
        self,
        backbone: Backbone,
        settings: Any,
        geometry: DataGeometry,
        *,
        stages: int | None = None,
        decoder: bool = False,
    ) -> None:
        super().__init__(backbone, settings, geometry)
        if decoder:
            backbone.set_deep_supervision(False)
            backbone.freeze_coarse_heads()
        else:
            backbone.train_encoder_only(stages)
        self.stages = stages
        self.channels = backbone.channels[: stages or None][-1]

    def encode(self, crops: Tensor) -> Tensor:
        """Encode all crops in one pass: (B, N, C, D, H, W) -> (B, N, 8 F).

        It averages the deepest feature map over octants.
        """
        features = self.backbone.features(crops.flatten(0, 1), self.stages)[-1]
        return grid_features(features).unflatten(0, crops.shape[:2])

    def result(self, loss: Tensor, features: Tensor, chance: float, **measures: Tensor) -> dict[str, Tensor]:
        """Collect what ``forward`` returns.

        Args:
            loss: (B,).
            features: (B, N, F), whose health is measured in evaluation.
            chance: Value of the readable number for a guess.
            measures: (B,) each, returned in evaluation only.
        """
        if self.training:
            return {"loss": loss}
        return {"loss": loss, **measures, "chance": torch.full_like(loss, chance), **self.health(features)}

    def health(self, features: Tensor) -> dict[str, Tensor]:
        """Measure ``feature_deviation`` and ``effective_rank`` of (B, N, F) over the global batch: (B,) each."""
        gathered = gather_samples(features, self.geometry.batch_size)[0].flatten(0, 1)
        measures = {"feature_deviation": feature_deviation(gathered), "effective_rank": effective_rank(gathered)}
        return {name: value.expand(len(features)) for name, value in measures.items()}


def classification(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and accuracy per sample: (B, N, classes), (B, N) -> twice (B,)."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    accuracy = (logits.argmax(-1) == target).float().mean(1)
    return loss.view(target.shape).mean(1), accuracy
