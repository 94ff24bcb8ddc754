"""Masks of input blocks, and statistics over blocks.

B batch, C channel, D H W voxels. Blocks at the far border may be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.random import BatchRandom, to_device


def draw_block_mask(random: BatchRandom, size: Sequence[int], block: Sequence[int], ratio: float) -> Tensor:
    """Mask a share of the blocks of each sample.

    The number of masked blocks is the nearest to ``ratio`` that leaves at least one masked and one visible.

    Args:
        random: One stream per sample.
        size: Edges of the crop in voxels.
        block: Edges of a block in voxels.
        ratio: Share of masked blocks.

    Returns:
        (B, D, H, W) bool on the device, True where masked.
    """
    grid = tuple(math.ceil(n / edge) for n, edge in zip(size, block, strict=True))
    total = math.prod(grid)
    masked = masked_blocks(total, ratio)
    order = random.uniform(0, 1, (total,)).argsort(1)
    mask = torch.zeros(len(random), total, dtype=torch.bool).scatter_(1, order[:, :masked], True)
    return expand_blocks(to_device(mask.view(-1, *grid), random.device), size, block)


def masked_blocks(total: int, ratio: float) -> int:
    """Return the number of masked blocks among ``total``."""
    return min(max(1, round(ratio * total)), max(1, total - 1))


def visible_tokens(masked: Tensor, token: Sequence[int], count: int) -> Tensor:
    """Find the tokens outside masked blocks, whose edges are multiples of the token's.

    (B, D, H, W) bool -> (B, V) positions, ascending, in the order of the flattened token grid. V is ``count``.
    """
    tokens = masked[:, :: token[0], :: token[1], :: token[2]].flatten(1)
    return tokens.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def expand_blocks(values: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Repeat values of blocks for their voxels: (..., blocks D, blocks H, blocks W) -> (..., *size)."""
    for axis, edge in zip((-3, -2, -1), block, strict=True):
        values = values.repeat_interleave(edge, dim=axis)
    return values[..., : size[0], : size[1], : size[2]]


def block_moments(image: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each block: (B, C, D, H, W) -> (B, C, blocks D, blocks H, blocks W) each."""
    # pooling refuses a kernel that is longer than the image
    kernel = tuple(min(pair) for pair in zip(block, image.shape[2:], strict=True))

    def pooled(values: Tensor) -> Tensor:
        return F.avg_pool3d(values, kernel, ceil_mode=True, count_include_pad=False)

    mean = pooled(image)
    centered = image - expand_blocks(mean, image.shape[2:], block)
    return mean, pooled(centered**2)
