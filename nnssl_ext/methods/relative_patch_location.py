"""Recognize on which side of a center a patch lies.

Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction", ICCV 2015. In 3-D: Taleb et al.,
"3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829.

B batch, N neighbors of a window, C channel, D H W voxels, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods.base import DataGeometry, Readable
from nnssl_ext.methods.encoder_only import classification
from nnssl_ext.methods.panels import Panel, axial
from nnssl_ext.methods.patches import PatchMethod, SpacedPatchSettings
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import GridHead, layers
from nnssl_ext.settings import setting
from nnssl_ext.views.layout import Layout, solve_layout
from nnssl_ext.views.random import BatchRandom, to_device

TALEB = "Taleb et al. 2020"
#: Patches in a row of the picture.
ROW = 9


@dataclass(frozen=True)
class RelativePatchLocationSettings(SpacedPatchSettings):
    """Settings of relative patch location."""

    neighbors_per_window: int = setting(8, "Neighbors classified in each window.", source=f"1 in {TALEB}", low=1)


class RelativePatchLocation(PatchMethod):
    """Classify a patch's place relative to the central patch.

    Central patch and neighbor are encoded by themselves. A head sees both vectors. Trains the encoder.
    """

    name = "relative_patch_location"
    title = "Relative patch location"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Doersch et al., ICCV 2015, arXiv:1505.05192"
    Settings = RelativePatchLocationSettings
    readable = Readable("accuracy", "Accuracy of the location")

    settings: RelativePatchLocationSettings
    layout: Layout

    def __init__(self, backbone: Backbone, settings: RelativePatchLocationSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        self.classes = math.prod(self.layout.grid) - 1
        self.neighbors = min(settings.neighbors_per_window, self.classes)
        self.embed = GridHead(channels=self.channels, hidden=[], outputs=settings.embedding_dim)
        widths = [2 * settings.embedding_dim, *settings.hidden_dims, self.classes]
        self.head = nn.Sequential(nn.LayerNorm(widths[0]), nn.GELU(), *layers(widths))

    @classmethod
    def solve_layout(cls, settings: RelativePatchLocationSettings, geometry: DataGeometry) -> Layout:
        # along each axis a center with a neighbor on both sides, or no neighbor at all
        return solve_layout(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            title=cls.title,
            gap=settings.gap,
            jitter=settings.jitter,
            max_zoom=settings.zoom,
            min_patches=3,
            choices=(1, 3),
        )

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``patches`` (B, 1 + N, C, D, H, W), center first, and ``location`` (B, N)."""
        location = random.uniform(0, 1, (self.classes,)).argsort(1)[:, : self.neighbors]
        # the center is no class: places behind it are one above their class
        center = self.classes // 2
        place = torch.cat([torch.full((len(location), 1), center), location + (location >= center)], 1)
        starts = self.layout.starts(random).gather(1, place[..., None].expand(-1, -1, 3))
        return {"patches": self.read_patches(batch, random, starts), "location": to_device(location, random.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``accuracy``, ``chance`` and health. Each is (B,)."""
        features = self.encode(views["patches"])
        loss, accuracy = classification(self._logits(features), views["location"])
        return self.result(loss, features, 1 / self.classes, accuracy=accuracy)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        center, *neighbors = axial(views["patches"][0])
        predicted = self._logits(self.encode(views["patches"][:1]))[0].argmax(-1)
        panels = [Panel("center", center)]
        for patch, place, guess in zip(neighbors, views["location"][0].tolist(), predicted.tolist(), strict=True):
            panels.append(Panel(f"at {self._offset(place)}\nguess {self._offset(guess)}", patch))
        return [panels[first : first + ROW] for first in range(0, len(panels), ROW)]

    def _logits(self, features: Tensor) -> Tensor:
        """Score all locations for each neighbor: (B, 1 + N, 8 F) -> (B, N, classes)."""
        embedded = self.embed(features)
        neighbor = embedded[:, 1:]
        return self.head(torch.cat([embedded[:, :1].expand_as(neighbor), neighbor], -1))

    def _offset(self, location: int) -> str:
        """Format a class as the offset from the center along D, H and W."""
        place = np.unravel_index(location + (location >= self.classes // 2), self.layout.grid)
        steps = [int(p) - n // 2 for p, n in zip(place, self.layout.grid, strict=True)]
        return " ".join(f"{step:+d}" if step else "0" for step in steps)
