"""Interpolate linearly per axis on the CPU.

No more is read and filtered than what is sampled.

Along the width it is a product with a small banded matrix, along height and depth a mean of two rows and of two
planes. A few planes go through at a time and stay in the core's cache.

D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.cpu.chunks import VOXELS
from nnssl_ext.views.filters import Taps

#: Voxels of the planes that are filtered at a time. Fewer calls are worth more here than the innermost cache.
TOGETHER = 4 * VOXELS
#: Rows of a banded matrix that are multiplied at a time, with no more columns than they touch.
TILE = 32


def interpolate(volume: Tensor, taps: Sequence[Taps | None], out: Tensor) -> Tensor:
    """Interpolate a volume (D, H, W) along its axes.

    Args:
        volume: On the CPU; every value finite.
        taps: For each axis; None leaves it.
        out: Where the result goes, of the new edges; may be ``volume`` where ``above`` never falls.
    """
    depth, height, width = taps
    bands = None if width is None else _bands(width, volume.shape[2])
    rows = None if height is None else _used_rows(height)
    step = max(1, TOGETHER // max(1, volume[0].numel()))
    if depth is None:
        for begin in range(0, len(volume), step):
            out[begin : begin + step] = _within(volume[begin : begin + step], rows, bands)
        return out
    # planes in the order in which they are needed first; each is filtered once
    below, above, shares = depth.below.tolist(), depth.above.tolist(), depth.share.tolist()
    order = list(dict.fromkeys(plane for pair in zip(below, above, strict=True) for plane in pair))
    last_use = {plane: place for place, pair in enumerate(zip(below, above, strict=True)) for plane in pair}
    filtered: dict[int, Tensor] = {}
    read = 0
    for place, (first, second, share) in enumerate(zip(below, above, shares, strict=True)):
        while first not in filtered or second not in filtered:
            chosen = order[read : read + step]
            filtered = {plane: values for plane, values in filtered.items() if last_use[plane] >= place}
            filtered |= dict(zip(chosen, _within(_planes(volume, chosen), rows, bands), strict=True))
            read += len(chosen)
        torch.lerp(filtered[first], filtered[second], share, out=out[place])
    return out


def _planes(volume: Tensor, chosen: list[int]) -> Tensor:
    """Copy the chosen planes of ``volume``. It may be overwritten while they are in use."""
    return volume.index_select(0, torch.tensor(chosen))


def _used_rows(taps: Taps) -> tuple[Tensor, Taps]:
    """Return the rows that are read, and their interpolation."""
    used, places = torch.unique(torch.cat([taps.below, taps.above]), return_inverse=True)
    below, above = places.view(2, -1)
    return used, Taps(below, above, taps.share)


def _within(
    planes: Tensor, height: tuple[Tensor, Taps] | None, width: list[tuple[slice, slice, Tensor]] | None
) -> Tensor:
    """Interpolate within planes (n, H, W). A new tensor is made where anything changes."""
    if height is not None and len(height[0]) < planes.shape[1]:
        planes = planes.index_select(1, height[0])
    if width is not None:
        flat = planes.reshape(-1, planes.shape[2])
        wide = planes.new_empty(len(flat), width[-1][0].stop)
        for rows, columns, values in width:
            torch.mm(flat[:, columns], values.T, out=wide[:, rows])
        planes = wide.view(*planes.shape[:2], -1)
    if height is not None:
        taps = height[1]
        below, above = planes.index_select(1, taps.below), planes.index_select(1, taps.above)
        planes = torch.lerp(below, above, taps.share[:, None], out=below)
    return planes


def _bands(taps: Taps, length: int) -> list[tuple[slice, slice, Tensor]]:
    """Return the interpolation matrix in pieces of rows. Each piece comes with the columns it touches."""
    number = len(taps.share)
    matrix = np.zeros((number, length), np.float32)
    below, above, share = (values.numpy() for values in taps)
    np.add.at(matrix, (np.arange(number), below), 1 - share)
    np.add.at(matrix, (np.arange(number), above), share)
    pieces = []
    for begin in range(0, number, TILE):
        rows = slice(begin, min(begin + TILE, number))
        low, high = min(below[rows].min(), above[rows].min()), max(below[rows].max(), above[rows].max()) + 1
        pieces.append((rows, slice(int(low), int(high)), torch.from_numpy(matrix[rows, low:high].copy())))
    return pieces
