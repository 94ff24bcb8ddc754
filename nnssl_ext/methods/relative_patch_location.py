"""Relative patch location: tell on which side of a central patch another patch lies.

Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction", ICCV 2015; in 3-D Taleb et al.,
"3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829. Encoder only.

B batch, N neighbours that are asked for, C channel, D H W voxels, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch, CropRequest
from nnssl_ext.methods.base import DataGeometry, OptimizerRecipe, Readable
from nnssl_ext.methods.encoder_only import EncoderMethod, classification, sample_index
from nnssl_ext.methods.patches import SpacedSettings, read_patches, window_request
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import GridHead, layers
from nnssl_ext.settings import setting
from nnssl_ext.views.layout import Layout, solve_layout
from nnssl_ext.views.random import BatchRandom, to_device

TALEB = "Taleb et al. 2020"


@dataclass(frozen=True)
class RelativePatchLocationSettings(SpacedSettings):
    """Settings of relative patch location."""

    neighbours: int = setting(8, "Neighbours asked for in each window; at most all.", source=f"1 in {TALEB}", low=1)


class RelativePatchLocation(EncoderMethod):
    """See the module's docstring."""

    name = "relative_patch_location"
    title = "Relative patch location"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Doersch et al., ICCV 2015, arXiv:1505.05192"
    Settings = RelativePatchLocationSettings
    readable = Readable("accuracy", "Accuracy of the location")

    settings: RelativePatchLocationSettings

    def __init__(self, backbone: Backbone, settings: RelativePatchLocationSettings, geometry: DataGeometry) -> None:
        grid = self.layout(settings, geometry)
        super().__init__(backbone, settings, geometry, stages=grid.stages)
        self.grid = grid
        self.classes = math.prod(grid.cells) - 1
        self.neighbours = min(settings.neighbours, self.classes)
        self.embed = GridHead(channels=self.channels, hidden=[], outputs=settings.embedding)
        widths = [2 * settings.embedding, *settings.hidden, self.classes]
        self.head = nn.Sequential(nn.LayerNorm(widths[0]), nn.GELU(), *layers(widths))

    @classmethod
    def layout(cls, settings: RelativePatchLocationSettings, geometry: DataGeometry) -> Layout:
        """Where patches lie: a centre with neighbours on both sides along an axis, or along that axis none."""
        return solve_layout(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            title=cls.title,
            gap=settings.gap,
            jitter=settings.jitter,
            most_zoom=settings.zoom,
            fewest=3,
            choices=(1, 3),
        )

    @classmethod
    def crops(cls, settings: RelativePatchLocationSettings, geometry: DataGeometry) -> CropRequest:
        return window_request(cls.layout(settings, geometry), geometry)

    def __str__(self) -> str:
        return f"{self.title}: {self.grid}"

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.peak()

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """``patches`` (B, 1 + N, C, D, H, W), the centre first, ``location`` (B, N), ``index`` (B,)."""
        location = random.uniform(0, 1, (self.classes,)).argsort(1)[:, : self.neighbours]
        # cells count along the grid; those behind the centre are one further than their class
        centre = self.classes // 2
        cell = torch.cat([torch.full((len(location), 1), centre), location + (location >= centre)], 1)
        starts = self.grid.starts(random).gather(1, cell[..., None].expand(-1, -1, 3))
        window, patch = self.grid.window, self.grid.patch
        patches = read_patches(self.settings, self.geometry, batch, random, window, starts, patch)
        index = sample_index(batch.indices, random.device)
        return {"patches": patches, "location": to_device(location, random.device), "index": index}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``; in evaluation ``accuracy``, its ``chance`` and health; each (B,)."""
        features = self.encode(views["patches"])
        embedded = self.embed(features)
        neighbour = embedded[:, 1:]
        pair = torch.cat([embedded[:, :1].expand_as(neighbour), neighbour], -1)  # (B, N, 2 E)
        loss, accuracy = classification(self.head(pair), views["location"])
        result = {"loss": loss}
        if not self.training:
            result |= {"accuracy": accuracy, "chance": torch.full_like(loss, 1 / self.classes)}
            result |= self.health(features, views["index"])
        return result
