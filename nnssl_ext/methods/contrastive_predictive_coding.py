"""Contrastive predictive coding: predict the vectors of patches from those of patches before them.

van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748; in 3-D Taleb et
al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829. Encoder only.

B batch (G over all processes), R rows, Q patches of a row, N = R Q, T predicted patches, C channel, D H W voxels,
E embedding, H summary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch, CropRequest
from nnssl_ext.losses.contrastive import hits, info_nce, paired_bce, products, similarities, within_sample
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe, Readable
from nnssl_ext.methods.encoder_only import EncoderMethod, sample_index
from nnssl_ext.methods.patches import PuzzleSettings, read_patches, window_request
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.context import ConvolutionalContext, RecurrentContext
from nnssl_ext.networks.heads import GridHead
from nnssl_ext.settings import setting
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.rows import RowLayout, Rows, solve_rows

OORD, TALEB = "arXiv 1807.03748", "Taleb et al. 2020"


@dataclass(frozen=True)
class ContrastivePredictiveCodingSettings(PuzzleSettings):
    """Settings of contrastive predictive coding."""

    context_rows: int = setting(2, "Rows that are seen.", low=1)
    skipped_rows: int = setting(1, "Rows between context and prediction; neighbours could be copied.", low=0)
    predicted_rows: int = setting(2, "Rows that are predicted.", source=TALEB, low=1)
    overlap: float = setting(
        0.5, "Overlap of one row with the next, as a share of a patch's edge.", source=OORD, low=0, high=0.9
    )
    gap: float = setting(
        0.25,
        "Least distance of context and prediction, as a share of a patch's edge.",
        source="nearer faces match",
        low=0,
        high=2,
    )
    columns: int = setting(2, "Most patches of a row, along each of its two axes.", low=1, high=4)
    directions: str = setting(
        "six", "Rows run in any direction that fits, drawn per window, or always in the same.", choices=("six", "one")
    )
    aggregator: str = setting("gru", "What sums up the context.", source=TALEB, choices=("gru", "convolution"))
    width: int = setting(256, "Width of the context's summary.", source=TALEB, low=1)
    loss: str = setting(
        "infonce",
        "Among all patches of the batch, or against one wrong patch.",
        source=f"InfoNCE {OORD}; bce {TALEB}",
        choices=("infonce", "bce"),
    )
    temperature: float = setting(0.1, "Divides InfoNCE's cosines.", low=0.01)
    voxels: float = setting(2.0, "Most voxels of all patches, in crops of the plan; fewer columns are taken.", low=0.1)


class ContrastivePredictiveCoding(EncoderMethod):
    """See the module's docstring."""

    name = "contrastive_predictive_coding"
    title = "Contrastive predictive coding"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; van den Oord et al., 2018, arXiv:1807.03748"
    Settings = ContrastivePredictiveCodingSettings
    readable = Readable("accuracy", "Accuracy among the predicted patches of a window")

    settings: ContrastivePredictiveCodingSettings

    def __init__(
        self, backbone: Backbone, settings: ContrastivePredictiveCodingSettings, geometry: DataGeometry
    ) -> None:
        layout = self.layout(settings, geometry)
        super().__init__(backbone, settings, geometry, stages=layout.stages)
        self.rows = layout
        self.columns = layout.beside(layout.axes[0])
        self.targets = settings.predicted_rows * self.columns
        self.embed = GridHead(channels=self.channels, hidden=settings.hidden, outputs=settings.embedding)
        self.direction = nn.Embedding(2 * len(layout.axes), settings.embedding)
        self.context: nn.Module
        if settings.aggregator == "gru":
            self.context = RecurrentContext(embedding=settings.embedding, width=settings.width)
        else:
            self.context = ConvolutionalContext(
                columns=self.columns, embedding=settings.embedding, width=settings.width
            )
        self.predict = nn.Linear(settings.width, self.targets * settings.embedding)

    @classmethod
    def layout(cls, settings: ContrastivePredictiveCodingSettings, geometry: DataGeometry) -> RowLayout:
        """Where patches lie."""
        s = settings
        return solve_rows(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            Rows(s.context_rows, s.skipped_rows, s.predicted_rows, s.overlap, s.gap),
            title=cls.title,
            columns=s.columns,
            most_zoom=s.zoom,
            most_voxels=s.voxels * math.prod(geometry.crop_size),
        )

    @classmethod
    def crops(cls, settings: ContrastivePredictiveCodingSettings, geometry: DataGeometry) -> CropRequest:
        return window_request(cls.layout(settings, geometry), geometry)

    def __str__(self) -> str:
        return f"{self.title}: {self.rows}"

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.peak()

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """``patches`` (B, N, C, D, H, W) row by row, context first, ``direction`` (B,), ``wrong`` (B, T), ``index``."""
        rows, device = self.rows, random.device
        last = 2 * len(rows.axes) - 1 if self.settings.directions == "six" else 0
        direction = random.integers(0, last)
        starts = rows.starts(direction, random.uniform(0, 1, (3,)))
        return {
            "patches": read_patches(self.settings, self.geometry, batch, random, rows.window, starts, rows.patch),
            "direction": to_device(direction, device),
            "wrong": to_device(random.uniform(0, 1, (self.targets,)), device),
            "index": sample_index(batch.indices, device),
        }

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``; in evaluation ``accuracy``, its ``chance``, ``batch_accuracy`` and health; each (B,)."""
        features = self.encode(views["patches"])
        embedded = self.embed(features)
        context = embedded[:, : -self.targets].unflatten(1, (-1, self.columns))  # (B, R, Q, E)
        summary = self.context(context + self.direction(views["direction"])[:, None, None])
        predicted = self.predict(summary).view(-1, embedded.shape[-1])  # (B T, E)

        # every patch of the global batch is a candidate; one's own stand at the end of one's own patches
        everyone, place = gather_samples(embedded, views["index"])  # (G, N, E), (B,)
        number = embedded.shape[1]
        own = torch.arange(number - self.targets, number, device=place.device)
        right = (place[:, None] * number + own).flatten()
        candidates = everyone.flatten(0, 1)
        if self.settings.loss == "infonce":
            loss = info_nce(predicted, candidates, right, self.settings.temperature)
        else:
            loss = paired_bce(predicted, candidates, right, views["wrong"].flatten())
        result = {"loss": loss.view(-1, self.targets).mean(1)}
        if not self.training:
            result |= self._readable(predicted, candidates, right, number)
            result |= self.health(features, views["index"])
        return result

    def _readable(self, predicted: Tensor, candidates: Tensor, right: Tensor, number: int) -> dict[str, Tensor]:
        if self.settings.loss == "infonce":
            scores = similarities(predicted, candidates)
        else:
            scores = products(predicted, candidates)
        place = torch.arange(len(candidates), device=right.device)
        # a patch of the context is never right: left out, so that chance is one in T
        targets = scores.masked_fill(place[None] % number < number - self.targets, -torch.inf)
        accuracy = hits(within_sample(targets, right, place // number), right).view(-1, self.targets).mean(1)
        among_all = hits(scores, right).view(-1, self.targets).mean(1)
        chance = torch.full_like(accuracy, 1 / self.targets)
        return {"accuracy": accuracy, "chance": chance, "batch_accuracy": among_all}
