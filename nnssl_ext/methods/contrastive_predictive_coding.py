"""Predict patches from earlier patches by contrast.

van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748. In 3-D: Taleb et
al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829.

B batch (G over all processes), R rows, Q patches of a row, N = R Q, T predicted patches, C channel, D H W voxels,
E embedding, H context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.losses.contrastive import hits, info_nce, paired_bce, products, similarities, within_sample
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.methods.base import DataGeometry, Readable
from nnssl_ext.methods.panels import Panel, axial
from nnssl_ext.methods.patches import PatchMethod, PatchSettings
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.context import ConvolutionalContext, RecurrentContext
from nnssl_ext.networks.heads import GridHead
from nnssl_ext.settings import setting
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.rows import RowLayout, Rows, solve_rows

OORD, TALEB = "arXiv 1807.03748", "Taleb et al. 2020"


@dataclass(frozen=True)
class ContrastivePredictiveCodingSettings(PatchSettings):
    """Settings of contrastive predictive coding."""

    context_rows: int = setting(2, "Rows of the context.", low=1)
    skipped_rows: int = setting(1, "Rows between context and prediction. Adjacent rows could be copied.", low=0)
    predicted_rows: int = setting(2, "Rows to predict.", source=TALEB, low=1)
    overlap: float = setting(
        0.5, "Overlap of consecutive rows, as a share of a patch's edge.", source=OORD, low=0, high=0.9
    )
    gap: float = setting(
        0.25,
        "Least distance of context and prediction, as a share of a patch's edge.",
        source="nearer faces match",
        low=0,
        high=2,
    )
    max_columns: int = setting(2, "Most patches of a row, along each of its two axes.", low=1, high=4)
    directions: str = setting(
        "six", "Draw the direction of rows per window, or always take the same.", choices=("six", "one")
    )
    aggregator: str = setting("gru", "Network over the context.", source=TALEB, choices=("gru", "convolution"))
    context_dim: int = setting(256, "Width of the context vector.", source=TALEB, low=1)
    loss: str = setting(
        "infonce",
        "Compare with all patches of the batch, or with one negative.",
        source=f"InfoNCE {OORD}; bce {TALEB}",
        choices=("infonce", "bce"),
    )
    temperature: float = setting(0.1, "Divisor of InfoNCE's cosine similarities.", low=0.01)
    max_voxels: float = setting(
        2.0, "Most voxels of all patches, in crops of the plan. Fewer columns are taken instead.", low=0.1
    )


class ContrastivePredictiveCoding(PatchMethod):
    """Predict embeddings of later rows from earlier rows.

    A context network summarizes the rows that are seen. A linear layer per target predicts an embedding, and the loss
    is InfoNCE over all patches of the global batch. Trains the encoder.
    """

    name = "contrastive_predictive_coding"
    title = "Contrastive predictive coding"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; van den Oord et al., 2018, arXiv:1807.03748"
    Settings = ContrastivePredictiveCodingSettings
    readable = Readable("accuracy", "Accuracy among the predicted patches of a window")

    settings: ContrastivePredictiveCodingSettings
    layout: RowLayout
    overlaps: Tensor

    def __init__(
        self, backbone: Backbone, settings: ContrastivePredictiveCodingSettings, geometry: DataGeometry
    ) -> None:
        super().__init__(backbone, settings, geometry)
        s = settings
        self.columns = self.layout.columns_of(self.layout.axes[0])
        self.targets = s.predicted_rows * self.columns
        self.embed = GridHead(channels=self.channels, hidden=s.hidden_dims, outputs=s.embedding_dim)
        self.direction = nn.Embedding(2 * len(self.layout.axes), s.embedding_dim)
        self.context: nn.Module
        if s.aggregator == "gru":
            self.context = RecurrentContext(embedding_dim=s.embedding_dim, context_dim=s.context_dim)
        else:
            self.context = ConvolutionalContext(
                rows=s.context_rows, columns=self.columns, embedding_dim=s.embedding_dim, context_dim=s.context_dim
            )
        overlaps = torch.from_numpy(self.layout.overlaps()[-self.targets :])  # (T, N)
        self.register_buffer("overlaps", overlaps, persistent=False)
        # a guess among the targets of a window that do not overlap the right one
        self.chance = (1 / (self.targets - overlaps[:, -self.targets :].sum(1))).mean().item()
        self.predict = nn.Linear(s.context_dim, self.targets * s.embedding_dim)

    @classmethod
    def solve_layout(cls, settings: ContrastivePredictiveCodingSettings, geometry: DataGeometry) -> RowLayout:
        s = settings
        return solve_rows(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            Rows(s.context_rows, s.skipped_rows, s.predicted_rows, s.overlap, s.gap),
            title=cls.title,
            max_columns=s.max_columns,
            max_zoom=s.zoom,
            max_voxels=s.max_voxels * math.prod(geometry.crop_size),
        )

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return patches row by row, context first.

        Returns:
            ``patches`` (B, N, C, D, H, W), ``direction`` (B,), ``negative`` (B, T) in [0, 1), and hashes of the
            windows' ``case`` (B,).
        """
        last = 2 * len(self.layout.axes) - 1 if self.settings.directions == "six" else 0
        direction = random.integers(0, last)
        starts = self.layout.starts(direction, random.uniform(0, 1, (3,)))
        return {
            "patches": self.read_patches(batch, random, starts),
            "direction": to_device(direction, random.device),
            "negative": to_device(random.uniform(0, 1, (self.targets,)), random.device),
            "case": to_device(torch.tensor([crc32(box.case.encode()) for box in batch.boxes[0]]), random.device),
        }

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``accuracy``, ``chance``, ``batch_accuracy`` and health; (B,) each."""
        features = self.encode(views["patches"])
        embedded = self.embed(features)
        predicted = self._predict(embedded, views["direction"])

        # every patch of the global batch is a candidate; a window's own targets are its last patches
        gathered, place = gather_samples(embedded, self.geometry.batch_size)  # (G, N, E), (B,)
        number = embedded.shape[1]
        target = torch.arange(number - self.targets, number, device=place.device)
        positive = (place[:, None] * number + target).flatten()
        candidates = gathered.flatten(0, 1)
        # patches that may show a target's voxels are no negatives: those of the own window that overlap it, and all of
        # other windows of the same case
        own = place[:, None] == torch.arange(len(gathered), device=place.device)  # (B, G)
        cases, _ = gather_samples(views["case"], self.geometry.batch_size)  # (G,)
        again = (views["case"][:, None] == cases) & ~own
        excluded = own[:, None, :, None] & self.overlaps[None, :, None] | again[:, None, :, None]
        excluded = excluded.flatten(2).flatten(0, 1)  # (B T, G N)
        if self.settings.loss == "infonce":
            loss = info_nce(predicted, candidates, positive, self.settings.temperature, excluded)
        else:
            loss = paired_bce(predicted, candidates, positive, views["negative"].flatten(), excluded)
        measures = {} if self.training else self._accuracies(predicted, candidates, positive, excluded)
        return self.result(loss.view(-1, self.targets).mean(1), features, self.chance, **measures)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        patches, targets = axial(views["patches"][0]), self.targets
        embedded = self.embed(self.encode(views["patches"][:1]))
        predicted = self._predict(embedded, views["direction"][:1])
        scores = self._scores(predicted, embedded[0, -targets:])
        chosen = scores.masked_fill(self.overlaps[:, -targets:], -torch.inf).argmax(1).tolist()
        verdicts = ["right" if place == number else f"target {place + 1}" for number, place in enumerate(chosen)]
        known, later = patches[:-targets], patches[-targets:]
        return [
            [Panel(f"row {n // self.columns + 1}, known", patch) for n, patch in enumerate(known)],
            [Panel(f"target {n + 1}", patch) for n, patch in enumerate(later)],
            [Panel(f"guess {n + 1}: {verdicts[n]}", later[place]) for n, place in enumerate(chosen)],
        ]

    def _predict(self, embedded: Tensor, direction: Tensor) -> Tensor:
        """Predict the targets' embeddings from the context: (B, N, E), (B,) -> (B T, E)."""
        rows = embedded[:, : -self.targets].unflatten(1, (-1, self.columns))  # (B, R, Q, E)
        context = self.context(rows + self.direction(direction)[:, None, None])
        return self.predict(context).view(-1, embedded.shape[-1])

    def _scores(self, predicted: Tensor, candidates: Tensor) -> Tensor:
        return (similarities if self.settings.loss == "infonce" else products)(predicted, candidates)

    def _accuracies(
        self, predicted: Tensor, candidates: Tensor, positive: Tensor, excluded: Tensor
    ) -> dict[str, Tensor]:
        """Measure accuracy within windows and the batch: (B,) each."""
        scores = self._scores(predicted, candidates).masked_fill(excluded, -torch.inf)
        number = self.overlaps.shape[1]
        place = torch.arange(len(candidates), device=positive.device)
        # patches of the context are never targets
        among_targets = scores.masked_fill(place[None] % number < number - self.targets, -torch.inf)
        accuracy = hits(within_sample(among_targets, positive, place // number), positive)
        batch_accuracy = hits(scores, positive)
        return {
            "accuracy": accuracy.view(-1, self.targets).mean(1),
            "batch_accuracy": batch_accuracy.view(-1, self.targets).mean(1),
        }
