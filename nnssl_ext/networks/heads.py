"""Heads from a feature map to one vector.

Global average pooling after an instance norm hides nearly everything, because the norm has made every channel's mean
equal. So a 2 x 2 x 2 grid is kept, which shows where in the crop a feature is strong.

B batch, C channel, D H W voxels of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 2


def grid_features(features: Tensor) -> Tensor:
    """Average over the eight octants of a feature map: (B, C, D, H, W) -> (B, 8 C)."""
    on_mps = features.device.type == "mps"  # lacks the operator
    return F.adaptive_avg_pool3d(features.cpu() if on_mps else features, GRID).flatten(1).to(features.device)


class GridHead(nn.Sequential):
    """Apply layers to the octants of a feature map: (B, 8 C) -> (B, outputs).

    Args:
        channels: C of the feature map.
        hidden: Widths of the layers between.
        outputs: Width of the result.
    """

    def __init__(self, *, channels: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__(*layers([GRID**3 * channels, *hidden, outputs]))


class VoxelHead(nn.Module):
    """Apply a layer at every voxel, average over octants, and apply a linear layer.

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
        """Return (B, outputs) of (B, C, D, H, W), and the pooled features (B, 8 hidden)."""
        pooled = grid_features(self.voxel(features))
        return self.linear(pooled), pooled


def layers(widths: Sequence[int]) -> list[nn.Module]:
    """Build linear layers of these widths, with layer norm and GELU between."""
    modules: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        if place:
            modules += [nn.LayerNorm(inputs), nn.GELU()]
        modules.append(nn.Linear(inputs, outputs))
    return modules


class TokenDecoder(nn.Module):
    """Let masked tokens attend to the visible ones, for pretraining alone: (B, N, E) -> (B, N, E).

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022: a light transformer with fixed positions
    behind the encoder.

    Args:
        width: E.
        grid: Tokens per axis, N together.
        depth: Number of blocks.
    """

    positions: Tensor

    def __init__(self, *, width: int, grid: Sequence[int], depth: int) -> None:
        super().__init__()
        heads = next(number for number in (8, 6, 4, 3, 2, 1) if width % number == 0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", sine_positions(grid, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def sine_positions(grid: Sequence[int], width: int) -> Tensor:
    """Compute sine positions of tokens, (1, N, width).

    Each axis has sines and cosines. Features that the axes do not fill are 0.
    """
    number = width // (2 * len(grid))
    rates = 100.0 ** -(torch.arange(number) / max(1, number))
    places = torch.stack(torch.meshgrid(*(torch.arange(edge) for edge in grid), indexing="ij"), -1).flatten(0, -2)
    angles = (places[:, :, None] * rates).flatten(1)  # (N, 3 number)
    found = torch.zeros(1, len(places), width)
    found[0, :, : 2 * angles.shape[1]] = torch.cat([angles.sin(), angles.cos()], 1)
    return found
