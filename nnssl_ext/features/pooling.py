"""Pool feature maps to vectors.

C channel, D H W voxels of the volume, d h w voxels of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from nnssl_ext.features.window import Grid

POOLS = ("mean", "max", "octants", "mask")
#: Region of a vector of the whole image.
IMAGE = "image"


def masks(
    pool: str, shape: Sequence[int], labels: Tensor | None, names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks (D, H, W) that are pooled, with the region of each.

    Args:
        pool: One of ``POOLS``.
        shape: Edges of the volume.
        labels: (D, H, W) label map, for ``mask``. The image and each label from 1 on are regions, nnU-Net's ignore
            label is none.
        names: Names of labels. Others are called by their number.
    """
    # an axis of odd length shares its middle, so that none of the octants of a slice is empty
    halves = [((0, (edge + 1) // 2), (edge // 2, edge)) if pool == "octants" else ((0, edge),) for edge in shape]
    for box in product(*halves):
        mask = torch.zeros(*shape, dtype=torch.bool)
        mask[tuple(slice(*ends) for ends in box)] = True
        yield IMAGE, mask
    if pool == "mask" and labels is not None:
        for value in torch.unique(labels[labels > 0]).tolist():
            if (name := names.get(value, str(value))) != "ignore":
                yield name, labels == value


def pooled(
    maps: Mapping[int, Tensor],
    regions: Iterator[tuple[str, Tensor]],
    grid: Grid,
    strides: Sequence[Sequence[int]],
    largest: bool = False,
) -> dict[str, dict[int, Tensor]]:
    """Pool maps over masks: region -> stage -> (C,).

    Vectors of several masks of one region, such as octants, follow each other. A mean weights each voxel of a stage
    with its share of the mask, so that padding counts nowhere.

    Args:
        maps: Stage -> (C, d, h, w).
        regions: Regions and their masks.
        grid: Place of the volume in the maps.
        strides: Stride of each stage.
        largest: Take the maximum over all voxels that the mask touches, instead of the mean.
    """
    vectors: dict[str, dict[int, list[Tensor]]] = {}
    for region, mask in regions:
        for stage, found in maps.items():
            share = grid.share(mask, strides[stage])
            vector = found[:, share > 0].amax(1) if largest else found.flatten(1) @ share.flatten() / share.sum()
            vectors.setdefault(region, {}).setdefault(stage, []).append(vector)
    return {region: {stage: torch.cat(parts) for stage, parts in found.items()} for region, found in vectors.items()}
