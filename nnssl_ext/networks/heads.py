"""Heads that turn a feature map into one vector.

B batch, C channel, D H W voxels of a feature map.

Global average pooling right after an instance norm hides nearly everything: the norm has just made every channel's
mean the same. So a 2 x 2 x 2 grid is kept, which tells where in the crop a feature is strong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

GRID = 2


def grid_features(features: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B, 8 C): means over the eight octants of a feature map."""
    return F.adaptive_avg_pool3d(features, GRID).flatten(1)


class GridHead(nn.Sequential):
    """Layers over the octants of a feature map: (B, 8 C) -> (B, outputs).

    Args:
        channels: C of the feature map.
        hidden: Widths of the layers between.
        outputs: Width of the result.
    """

    def __init__(self, *, channels: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__(*layers([GRID**3 * channels, *hidden, outputs]))


class VoxelHead(nn.Module):
    """A layer at every voxel of a feature map, then the means over octants, then a linear layer.

    Octants are what tells images apart: after an instance norm the mean over a whole map cannot, with a layer before it
    or without.

    Args:
        channels: C of the feature map.
        hidden: Width of the layer at every voxel.
        outputs: Width of the result.
    """

    def __init__(self, *, channels: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.voxel = nn.Sequential(nn.Conv3d(channels, hidden, 1), nn.GELU())
        self.linear = nn.Linear(GRID**3 * hidden, outputs)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D, H, W) -> (B, outputs), and the pooled features (B, 8 hidden)."""
        pooled = grid_features(self.voxel(features))
        return self.linear(pooled), pooled


def layers(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers of these widths, with a norm over features and GELU between."""
    parts: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        if place:
            parts += [nn.LayerNorm(inputs), nn.GELU()]
        parts.append(nn.Linear(inputs, outputs))
    return parts
