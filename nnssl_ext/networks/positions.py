"""Resize tables of learned positions to other token grids.

N tokens, E width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(
    table: Tensor, grid: Sequence[int], target: Sequence[int], prefix: int = 0, offset: float = 0.0
) -> Tensor:
    """Interpolate positions trilinearly: (1, prefix + N, E) -> (1, prefix + N', E).

    Args:
        table: Learned positions. The prefix (CLS and register tokens) has no place and is kept.
        grid: Tokens per axis of the table.
        target: Tokens per axis of the result.
        prefix: Tokens before those of the grid.
        offset: Added to the target's edges when the scale is computed. DINOv2 and 3DINO use 0.1.

    Raises:
        ValueError: If the table does not have the grid's tokens.
    """
    if len(grid) != 3 or table.shape[1] - prefix != torch.Size(grid).numel():
        raise ValueError(f"{table.shape[1] - prefix} positions do not fill a grid of {tuple(grid)}")
    if tuple(grid) == tuple(target):
        return table
    volume = table[:, prefix:].transpose(1, 2).unflatten(2, tuple(grid))
    volume = volume.to(torch.promote_types(table.dtype, torch.float32))
    if offset:
        scale = tuple((new + offset) / old for old, new in zip(grid, target, strict=True))
        resized = F.interpolate(volume, scale_factor=scale, mode="trilinear", align_corners=False)
    else:
        resized = F.interpolate(volume, size=tuple(target), mode="trilinear", align_corners=False)
    return torch.cat([table[:, :prefix], resized.flatten(2).transpose(1, 2).to(table.dtype)], 1)
