"""Crop on the CPU by copies and products per axis.

The definition is ``views.spatial.resample_batch``, and the tests hold these functions to it.

C channel, D H W voxels. ``matrix`` and ``center`` are those of a ``SourceBox``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.cpu.chunks import scratch
from nnssl_ext.views.cpu.linear import interpolate
from nnssl_ext.views.filters import Taps


def source_axes(matrix: np.ndarray) -> list[int] | None:
    """Return the crop's axis of each source axis. None where ``matrix`` mixes axes."""
    axes = []
    for row in matrix.tolist():  # faster than arrays of three
        used = [axis for axis, value in enumerate(row) if value]
        if len(used) != 1 or used[0] in axes:
            return None
        axes += used
    return axes


def is_copy(matrix: np.ndarray, center: np.ndarray, axes: Sequence[int], size: Sequence[int]) -> bool:
    """Return whether all voxels of a crop are voxels of the source, and none lies between two."""
    if any(abs(sum(row)) != 1 for row in matrix.tolist()):
        return False
    low = [place - (size[axis] - 1) / 2 for place, axis in zip(center.tolist(), axes, strict=True)]
    return all(abs(place - round(place)) < 1e-6 for place in low)


def copy_crop(data: Tensor, matrix: np.ndarray, center: np.ndarray, axes: Sequence[int], crop: Tensor) -> Tensor | None:
    """Copy a crop that ``is_copy``. Its matrix is a signed permutation.

    Fills ``crop`` (C, D, H, W) from ``data`` (C, d, h, w), with ``axes`` from ``source_axes``. Returns ``inside``
    (1, D, H, W) bool, or None where no voxel lies outside.
    """
    # plain integers: arrays of three would take longer than the copy of a small crop
    edges = [int(crop.shape[1 + axis]) for axis in axes]
    low = [round(place - (edge - 1) / 2) for place, edge in zip(center.tolist(), edges, strict=True)]
    begin = [min(max(first, 0), length) for first, length in zip(low, data.shape[1:], strict=True)]
    end = [
        min(max(first + edge, start), length)
        for first, edge, start, length in zip(low, edges, begin, data.shape[1:], strict=True)
    ]
    # the crop along the source's axes
    turned = crop.permute(0, *(1 + axis for axis in axes))
    mirrored = [sum(row) < 0 for row in matrix.tolist()]
    source = data[(slice(None), *map(slice, begin, end))]
    if list(source.shape[1:]) == edges:
        _mirror_into(turned, source, mirrored)
        return None
    # in a mirrored axis the crop's first voxel is the source's last
    places = [
        slice(first + edge - stop, first + edge - start) if mirror else slice(start - first, stop - first)
        for first, edge, start, stop, mirror in zip(low, edges, begin, end, mirrored, strict=True)
    ]
    target = (slice(None), *places)
    crop.zero_()
    _mirror_into(turned[target], source, mirrored)
    inside = torch.zeros((1, *crop.shape[1:]), dtype=torch.bool)
    inside.permute(0, *(1 + axis for axis in axes))[target] = True
    return inside


def _mirror_into(target: Tensor, source: Tensor, mirrored: list[bool]) -> None:
    """Copy (C, d, h, w) with some axes mirrored, a channel at a time.

    numpy copies mirrored axes in one pass, which takes up to four times as long where only the last is mirrored.
    """
    axes = [axis for axis, mirror in enumerate(mirrored) if mirror]
    for image, channel in zip(target, source, strict=True):  # new memory for all channels takes longer by far
        image.copy_(channel.flip(axes) if axes else channel)


def interpolate_crop(
    data: Tensor, matrix: np.ndarray, center: np.ndarray, axes: Sequence[int], crop: Tensor
) -> Tensor | None:
    """Interpolate a scaled, mirrored or quarter-turned crop.

    One axis follows the other.

    Arguments and result are those of ``copy_crop``.
    """
    taps, insides = [], []
    for axis, of_crop in enumerate(axes):
        length, edge = data.shape[1 + axis], crop.shape[1 + of_crop]
        place = center[axis] + matrix[axis, of_crop] * (np.arange(edge) - (edge - 1) / 2)
        insides.append((place >= -0.5) & (place <= length - 0.5))
        place = place.clip(0, length - 1)
        below = np.minimum(place.astype(np.int64), max(length - 2, 0))
        above = np.minimum(below + 1, length - 1)
        share = (place - below).astype(np.float32)
        taps.append(Taps(*map(torch.from_numpy, (below, above, share))))
    turned = crop.permute(0, *(1 + axis for axis in axes))
    straight = list(axes) == [0, 1, 2]
    for source, target in zip(data, turned, strict=True):
        if straight:
            interpolate(source, taps, target)
        else:
            target.copy_(interpolate(source, taps, scratch(target.shape, crop.device, "turned")))
    if all(within.all() for within in insides):
        return None
    depth, height, width = (torch.from_numpy(within) for within in insides)
    inside = (depth[:, None, None] & height[:, None] & width).permute([list(axes).index(axis) for axis in range(3)])
    crop.mul_(inside)
    return inside[None]
