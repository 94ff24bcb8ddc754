"""Cut views of several sizes and mask patches.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (multi-crop), NeurIPS 2020,
arXiv 2006.09882; in 3-D Xu et al., "3DINO", npj Digital Medicine 2025. The first axis is the depth: the one with thick
slices where there is one.

B batch, V views of a sample, C channel, D H W voxels, N patches of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nnssl_ext.views.appearance import Exclusive, IntensityDraw, IntensitySettings
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import SourceBox, SpatialRange, crop_batch, is_constant, subview

#: Most draws of a view until it shows more than one value.
CONSTANT_TRIES = 32


@dataclass(frozen=True)
class ViewKind:
    """Describe views of one kind: number, size, region share.

    Attributes:
        number: V.
        size: Edges in voxels.
        area: Range of the share of the region in the plane of the last two axes.
        depth: The same along the first axis.
        turns: Their mirrors and quarter turns.
        masked: For each channel, whether intensity views keep zero outside of the image.
    """

    number: int
    size: tuple[int, int, int]
    area: tuple[float, float]
    depth: tuple[float, float]
    turns: SpatialRange
    masked: tuple[bool, ...] = ()

    def draw(self, generator: np.random.Generator, region: Sequence[int]) -> np.ndarray:
        """Draw a matrix (3, 3) from view to region voxels."""
        plane, depth = np.sqrt(generator.uniform(*self.area)), generator.uniform(*self.depth)
        share = np.array([depth, plane, plane])
        scale = share * (np.asarray(region) - 1) / np.maximum(np.asarray(self.size) - 1, 1)
        return np.diag(scale) @ self.turns.draw(generator, self.size)


def draw_view(box: SourceBox, region: Sequence[int], kind: ViewKind, generator: np.random.Generator) -> SourceBox:
    """Place one view at random within a read region."""
    view, place = kind.draw(generator, region), generator.uniform(-1, 1, 3)
    return subview(box, region, view, place, view_size=kind.size)


def draw_views(
    boxes: Sequence[SourceBox], region: Sequence[int], kind: ViewKind, random: BatchRandom
) -> list[SourceBox]:
    """Place one kind of views: (B V) boxes, those of a sample in a row.

    A view that would show a single value (air) is drawn again, up to ``CONSTANT_TRIES`` times. ``boxes`` hold regions
    with the edges ``region`` in voxels.
    """
    views = []
    for b, box in enumerate(boxes):
        generator = random.generator(b)
        for _ in range(kind.number):
            for _ in range(CONSTANT_TRIES):
                drawn = draw_view(box, region, kind, generator)
                if not is_constant(drawn, kind.size):
                    break
            views.append(drawn)
    return views


def look_at(
    views: Sequence[SourceBox],
    kind: ViewKind,
    intensity: IntensitySettings,
    random: BatchRandom,
    exclusive: Sequence[Exclusive] = (),
) -> Tensor:
    """Cut placed views and apply intensity views.

    (B V) boxes, those of a sample in a row -> (B, V, C, D, H, W). Each view has its own intensities, and one at most of
    each ``exclusive`` group.
    """
    crops, _ = crop_batch(views, kind.size, random.device)
    image = crops.unflatten(0, (len(random), -1))
    shape = {"channels": image.shape[2], "spacing": kind.turns.spacing, "views": image.shape[1]}
    return IntensityDraw.draw(intensity, random, **shape, exclusive=exclusive, masked=kind.masked).apply(image)


def draw_patch_masks(
    random: BatchRandom, views: int, patches: int, probability: float, ratio: Sequence[float]
) -> Tensor:
    """Draw masks of patches: (B, V, N) bool on the CPU.

    A view has masked patches with ``probability``, a share of them in the range ``ratio``, at least one.
    """
    chosen = random.chance(probability, (views,))
    share = random.uniform(ratio[0], ratio[1], (views,))
    number = (share * patches).round().clamp_min(1) * chosen
    rank = random.uniform(0, 1, (views, patches)).argsort(-1).argsort(-1)
    return rank < number[..., None]
