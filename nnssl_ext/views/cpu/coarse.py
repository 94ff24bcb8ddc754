"""A volume sampled down and back up on the CPU, with no more read and filtered than what is sampled.

Along the width it is a product with a small matrix, along height and depth a mean of two rows and of two planes; a few
planes at a time, which stay in the core's cache.

D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.cpu.chunks import VOXELS
from nnssl_ext.views.cpu.separable import TILE, banded_parts

#: Voxels of the planes that are filtered at a time: fewer calls are worth more here than the innermost cache.
TOGETHER = 4 * VOXELS


class Coarse(NamedTuple):
    """One axis of ``length`` voxels, of which ``small`` are sampled.

    Attributes:
        nearest: (small,) which they are.
        below, above: (length,) between which two samples each voxel lies.
        share: (length,) of the one above.
    """

    nearest: Tensor
    below: Tensor
    above: Tensor
    share: Tensor


@lru_cache(maxsize=64)
def coarse(small: int, length: int) -> Coarse:
    """The ``small`` nearest of ``length`` voxels, and linear interpolation back (torch's, corners not aligned)."""
    nearest = F.interpolate(torch.arange(length)[None, None].double(), size=small, mode="nearest-exact")[0, 0].long()
    place = ((torch.arange(length) + 0.5) * (small / length) - 0.5).clamp(0, small - 1)
    below = place.floor().long()
    return Coarse(nearest, below, (below + 1).clamp_max(small - 1), (place - below).float())


@lru_cache(maxsize=64)
def coarse_matrix(small: int, length: int) -> Tensor:
    """The same as a matrix (length, length)."""
    axis, rows = coarse(small, length), torch.arange(length)
    result = torch.zeros(length, length)
    result.index_put_((rows, axis.nearest[axis.below]), 1 - axis.share, accumulate=True)
    return result.index_put_((rows, axis.nearest[axis.above]), axis.share, accumulate=True)


def lower(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Sample a volume (D, H, W) on the CPU down to ``size`` and back up, in place."""
    depth, height, width = (None if m == n else coarse(m, n) for m, n in zip(size, volume.shape, strict=True))
    columns = None if width is None else _columns(size[2], volume.shape[2])
    together = max(1, TOGETHER // volume[0].numel())
    if depth is None:
        for begin in range(0, len(volume), together):
            planes = volume[begin : begin + together]
            planes.copy_(_within(planes, height, columns))
        return volume
    below, above, shares = depth.below.tolist(), depth.above.tolist(), depth.share.tolist()
    filtered: dict[int, Tensor] = {}
    read = 0
    for place, share in enumerate(shares):
        # a plane is written when every sample up to the one above it was read, and that one is no earlier plane
        while read <= above[place]:
            chosen = depth.nearest[read : read + together]
            planes = _within(volume.index_select(0, chosen), height, columns)
            filtered = {n: plane for n, plane in filtered.items() if n >= below[place]}
            filtered |= dict(enumerate(planes, read))
            read += len(chosen)
        torch.lerp(filtered[below[place]], filtered[above[place]], share, out=volume[place])
    return volume


def _within(planes: Tensor, height: Coarse | None, width: list[tuple[slice, slice, Tensor]] | None) -> Tensor:
    """The same within planes (n, H, W), as a new tensor where anything changes."""
    if height is not None:
        planes = planes.index_select(1, height.nearest)
    if width is not None:
        flat, wide = planes.reshape(-1, planes.shape[2]), planes.new_empty(planes.shape)
        for rows, touched, values in width:
            torch.mm(flat[:, touched], values.T, out=wide.view(flat.shape)[:, rows])
        planes = wide
    if height is not None:
        below, above = planes.index_select(1, height.below), planes.index_select(1, height.above)
        planes = torch.lerp(below, above, height.share[:, None], out=below)
    return planes


@lru_cache(maxsize=64)
def _columns(small: int, length: int) -> list[tuple[slice, slice, Tensor]]:
    return banded_parts(coarse_matrix(small, length), TILE)
