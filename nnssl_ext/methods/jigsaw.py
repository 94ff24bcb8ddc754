"""Jigsaw: tell in which order the patches of a window were shuffled.

Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016; in 3-D
Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829. Encoder only.

B batch, N patches, Q puzzles of a sample, P permutations, C channel, D H W voxels, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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
#: With fewer patches there are too few orders to make a task.
FEWEST_PATCHES = 4
#: How many random permutations the set is chosen from.
POOL = 200_000


@dataclass(frozen=True)
class JigsawSettings(SpacedSettings):
    """Settings of the jigsaw."""

    permutations: int = setting(100, "Orders to tell apart; all, if there are fewer.", source=TALEB, low=2, high=1000)
    puzzles: int = setting(16, "Orders that are drawn for each window.", source=f"1 in {TALEB}", low=1)
    voxels: float = setting(2.0, "Most voxels of all patches, in crops of the plan; a smaller grid is taken.", low=0.1)


class Jigsaw(EncoderMethod):
    """See the module's docstring."""

    name = "jigsaw"
    title = "Jigsaw"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Noroozi and Favaro, ECCV 2016, arXiv:1603.09246"
    Settings = JigsawSettings
    readable = Readable("accuracy", "Accuracy of the order")

    settings: JigsawSettings
    permutations: Tensor

    def __init__(self, backbone: Backbone, settings: JigsawSettings, geometry: DataGeometry) -> None:
        grid = self.layout(settings, geometry)
        super().__init__(backbone, settings, geometry, stages=grid.stages)
        self.grid, number = grid, math.prod(grid.cells)
        # drawn as the initial weights are, from the run's seed, and kept in the checkpoint
        seed = int(torch.randint(1 << 31, ()))
        orders = distant_permutations(np.random.default_rng(seed), number, settings.permutations)
        self.register_buffer("permutations", torch.from_numpy(orders))
        self.embed = GridHead(channels=self.channels, hidden=[], outputs=settings.embedding)
        widths = [number * settings.embedding, *settings.hidden, len(orders)]
        self.head = nn.Sequential(nn.LayerNorm(widths[0]), nn.GELU(), *layers(widths))

    @classmethod
    def layout(cls, settings: JigsawSettings, geometry: DataGeometry) -> Layout:
        """Where patches lie."""
        return solve_layout(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            title=cls.title,
            gap=settings.gap,
            jitter=settings.jitter,
            most_zoom=settings.zoom,
            fewest=FEWEST_PATCHES,
            most_voxels=settings.voxels * math.prod(geometry.crop_size),
        )

    @classmethod
    def crops(cls, settings: JigsawSettings, geometry: DataGeometry) -> CropRequest:
        return window_request(cls.layout(settings, geometry), geometry)

    def __str__(self) -> str:
        return f"{self.title}: {self.grid}"

    def optimizer(self) -> OptimizerRecipe:
        return self.settings.peak()

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """``patches`` (B, N, C, D, H, W) in their own order, ``order`` (B, Q), ``index`` (B,)."""
        starts, grid = self.grid.starts(random), self.grid
        patches = read_patches(self.settings, self.geometry, batch, random, grid.window, starts, grid.patch)
        order = to_device(random.integers(0, len(self.permutations) - 1, (self.settings.puzzles,)), random.device)
        return {"patches": patches, "order": order, "index": sample_index(batch.indices, random.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``; in evaluation ``accuracy``, its ``chance`` and health; each (B,)."""
        label = views["order"]
        features = self.encode(views["patches"])
        # a patch's vector does not depend on its place, so one pass serves all puzzles of a window
        embedded, sample = self.embed(features), torch.arange(len(label), device=label.device)
        shuffled = embedded[sample[:, None, None], self.permutations[label]]  # (B, Q, N, E)
        loss, accuracy = classification(self.head(shuffled.flatten(2)), label)
        result = {"loss": loss}
        if not self.training:
            result |= {"accuracy": accuracy, "chance": torch.full_like(loss, 1 / len(self.permutations))}
            result |= self.health(features, views["index"])
        return result


def distant_permutations(generator: np.random.Generator, number: int, wanted: int) -> np.ndarray:
    """Permutations (P, number) int64 far from each other in Hamming distance.

    Of a random pool, in its order, those are taken that keep the largest distance at which enough can be found.
    """
    wanted = min(wanted, math.factorial(number))
    pool = generator.permuted(np.tile(np.arange(number, dtype=np.int8), (POOL, 1)), axis=1)
    for least in range(number, 0, -1):
        left = pool
        chosen: list[np.ndarray] = []
        while len(left) and len(chosen) < wanted:
            chosen.append(left[0])
            left = left[(left != left[0]).sum(1) >= least]
        if len(chosen) == wanted:
            break
    return np.stack(chosen).astype(np.int64)
