"""Recognize the order of a window's shuffled patches.

Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016. In 3-D:
Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv 2006.03829.

B batch, N patches, Q puzzles of a sample, P permutations, C channel, D H W voxels, E embedding.
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
from nnssl_ext.methods.panels import Panel, assemble, assembled_center
from nnssl_ext.methods.patches import PatchMethod, SpacedPatchSettings
from nnssl_ext.networks.base import Backbone
from nnssl_ext.networks.heads import GridHead, layers
from nnssl_ext.settings import setting
from nnssl_ext.views.layout import Layout, solve_layout
from nnssl_ext.views.random import BatchRandom, to_device

TALEB = "Taleb et al. 2020"
#: Fewer patches have too few orders to make a task.
MIN_PATCHES = 4
#: Random permutations from which the set is chosen.
POOL = 200_000


@dataclass(frozen=True)
class JigsawSettings(SpacedPatchSettings):
    """Settings of the jigsaw."""

    permutations: int = setting(
        100, "Orders to distinguish. All of them, if there are fewer.", source=TALEB, low=2, high=1000
    )
    permutations_per_window: int = setting(16, "Orders drawn for each window.", source=f"1 in {TALEB}", low=1)
    max_voxels: float = setting(
        2.0, "Most voxels of all patches, in crops of the plan. A smaller grid is taken instead.", low=0.1
    )


class Jigsaw(PatchMethod):
    """Classify the permutation of a window's patches.

    Each patch is encoded by itself. A head sees the patches' vectors in the shuffled order. Trains the encoder.
    """

    name = "jigsaw"
    title = "Jigsaw"
    citation = "Taleb et al., NeurIPS 2020, arXiv:2006.03829; Noroozi and Favaro, ECCV 2016, arXiv:1603.09246"
    Settings = JigsawSettings
    readable = Readable("accuracy", "Accuracy of the order")

    settings: JigsawSettings
    layout: Layout
    permutations: Tensor

    def __init__(self, backbone: Backbone, settings: JigsawSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        number = math.prod(self.layout.grid)
        # drawn from the run's seed like the initial weights, and kept in the checkpoint
        seed = int(torch.randint(1 << 31, ()))
        orders = distant_permutations(np.random.default_rng(seed), number, settings.permutations)
        self.register_buffer("permutations", torch.from_numpy(orders))
        self.embed = GridHead(channels=self.channels, hidden=[], outputs=settings.embedding_dim)
        widths = [number * settings.embedding_dim, *settings.hidden_dims, len(orders)]
        self.head = nn.Sequential(nn.LayerNorm(widths[0]), nn.GELU(), *layers(widths))

    @classmethod
    def solve_layout(cls, settings: JigsawSettings, geometry: DataGeometry) -> Layout:
        return solve_layout(
            geometry.strides,
            geometry.case_size or geometry.crop_size,
            title=cls.title,
            gap=settings.gap,
            jitter=settings.jitter,
            max_zoom=settings.zoom,
            min_patches=MIN_PATCHES,
            max_voxels=settings.max_voxels * math.prod(geometry.crop_size),
        )

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Return ``patches`` (B, N, C, D, H, W) and ``order`` (B, Q)."""
        patches = self.read_patches(batch, random, self.layout.starts(random))
        order = random.integers(0, len(self.permutations) - 1, (self.settings.permutations_per_window,))
        return {"patches": patches, "order": to_device(order, random.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss``. In evaluation also ``accuracy``, ``chance`` and health. Each is (B,)."""
        label = views["order"]
        features = self.encode(views["patches"])
        loss, accuracy = classification(self._logits(features, label), label)
        return self.result(loss, features, 1 / len(self.permutations), accuracy=accuracy)

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        patches, order = views["patches"][0, :, 0], views["order"][:1, :1]
        predicted = self._logits(self.encode(views["patches"][:1]), order).argmax(-1)
        shuffled = patches[self.permutations[order[0, 0]]]
        restored = torch.empty_like(patches)
        restored[self.permutations[predicted[0, 0]]] = shuffled
        shown = {
            f"in order {int(order)} (input)": shuffled,
            f"put back by the predicted order {int(predicted)}": restored,
            "in their places (target)": patches,
        }
        grid = self.layout.grid
        center = assembled_center(self.layout.patch, grid)
        return [[Panel(title, assemble(own, grid), center=center) for title, own in shown.items()]]

    def _logits(self, features: Tensor, order: Tensor) -> Tensor:
        """Score all permutations for each puzzle: (B, N, 8 F), (B, Q) -> (B, Q, P)."""
        # a patch's vector does not depend on its place, so one pass serves all puzzles of a window
        embedded, sample = self.embed(features), torch.arange(len(order), device=order.device)
        shuffled = embedded[sample[:, None, None], self.permutations[order]]  # (B, Q, N, E)
        return self.head(shuffled.flatten(2))


def distant_permutations(generator: np.random.Generator, number: int, wanted: int) -> np.ndarray:
    """Choose distant permutations (P, number) int64.

    Their mutual Hamming distance is large.

    A random pool is searched in order. The largest distance is kept at which enough permutations are found.
    """
    wanted = min(wanted, math.factorial(number))
    pool = generator.permuted(np.tile(np.arange(number, dtype=np.int8), (POOL, 1)), axis=1)
    for distance in range(number, 0, -1):
        left = pool
        chosen: list[np.ndarray] = []
        while len(left) and len(chosen) < wanted:
            chosen.append(left[0])
            left = left[(left != left[0]).sum(1) >= distance]
        if len(chosen) == wanted:
            break
    return np.stack(chosen).astype(np.int64)
