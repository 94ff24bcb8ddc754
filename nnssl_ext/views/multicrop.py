"""Views of several sizes from one region of a case, and masks over the cells of a view.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (multi-crop), NeurIPS 2020,
arXiv 2006.09882; in 3-D Xu et al., "3DINO", npj Digital Medicine 2025. The first axis is the depth: the one with thick
slices where there is one.

B batch, V views of a sample, C channel, D H W voxels, N cells of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.appearance import IntensityDraw, IntensitySettings
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import SourceBox, SpatialRange, crop_batch, is_constant, subview

#: Draws of a view until it shows more than one value.
CONSTANT_TRIES = 32


@dataclass(frozen=True)
class ViewKind:
    """Views of one kind.

    Attributes:
        number: V.
        size: Edges in voxels.
        area: Smallest and largest share of the region in the plane of the last two axes.
        depth: The same along the first axis.
        turns: Mirrors and quarter turns.
    """

    number: int
    size: tuple[int, int, int]
    area: tuple[float, float]
    depth: tuple[float, float]
    turns: SpatialRange

    def draw(self, generator: np.random.Generator, region: Sequence[int]) -> np.ndarray:
        """(3, 3), from voxels of a view to voxels of the region with these edges, in voxels."""
        plane, depth = np.sqrt(generator.uniform(*self.area)), generator.uniform(*self.depth)
        share = np.array([depth, plane, plane])
        scale = share * (np.asarray(region) - 1) / np.maximum(np.asarray(self.size) - 1, 1)
        return np.diag(scale) @ self.turns.draw(generator, self.size)


def crop_views(
    boxes: Sequence[SourceBox],
    region: Sequence[int],
    kind: ViewKind,
    intensity: IntensitySettings,
    random: BatchRandom,
) -> Tensor:
    """Views of one kind of each sample's region, each with its own look: (B, V, C, D, H, W).

    A view that would show one value everywhere (air) is drawn again, a number of times.

    Args:
        boxes: What was read for the regions.
        region: Edges of the regions, in voxels.
        kind: What views.
        intensity: Their intensity views.
        random: Where draws come from.
    """
    views = []
    there = [box.data.to(random.device, torch.float32, non_blocking=True) for box in boxes]  # once for all views
    for _ in range(kind.number):
        parts = []
        for b, box in enumerate(boxes):
            generator = random.generator(b)
            for _ in range(CONSTANT_TRIES):
                view, place = kind.draw(generator, region), generator.uniform(-1, 1, 3)
                drawn = subview(box, region, view, place, view_size=kind.size)
                if not is_constant(drawn, kind.size):
                    break
            parts.append(replace(drawn, data=there[b]))
        image, _ = crop_batch(parts, kind.size, random.device)
        IntensityDraw.draw(intensity, random, image.shape[1], kind.turns.spacing).apply(image, random)
        views.append(image)
    return torch.stack(views, 1)


def draw_patch_masks(random: BatchRandom, views: int, cells: int, probability: float, ratio: Sequence[float]) -> Tensor:
    """Which cells of which views are hidden: (B, V, N) bool on the CPU.

    Args:
        random: Where draws come from.
        views: V.
        cells: N.
        probability: Chance that a view hides any.
        ratio: Smallest and largest share of its cells that it then hides, at least one.
    """
    chosen = random.chance(probability, (views,))
    share = random.uniform(ratio[0], ratio[1], (views,))
    number = (share * cells).round().clamp_min(1) * chosen
    rank = random.uniform(0, 1, (views, cells)).argsort(-1).argsort(-1)
    return rank < number[..., None]
