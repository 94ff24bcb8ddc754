"""Separable linear filters: one matrix along each axis of a volume, as matrix products.

A product with a small dense matrix runs at the full speed of the arithmetic units, which direct 3-D convolutions of one
channel do not: a Gaussian of 128^3 voxels takes a tenth of their time on a CPU core.

D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.cpu.chunks import VOXELS
from nnssl_ext.views.random import to_device

#: On the CPU: planes, at least, that go through the products at a time while they are in the core's cache; and rows of
#: a banded matrix, at most, that are multiplied at a time, with no more columns than they touch.
PLANES, TILE = 8, 32


class Bands(NamedTuple):
    """A matrix (new length, length) for the CPU, without most of its zeros.

    Attributes:
        shape: Of the matrix.
        parts: Rows, the columns in which they are not all zero, and the values there.
        stack: The same for equally many rows each: (T, rows, K) for windows of K columns, ``length / T`` apart, whose
            first begins ``margin`` columns before the matrix, where the values are zero.
        margin: See there.
    """

    shape: tuple[int, int]
    parts: list[tuple[slice, slice, Tensor]]
    stack: Tensor
    margin: int


def bands(matrix: Tensor) -> Bands:
    """Split a matrix on the CPU."""
    values = matrix.numpy()
    rows, length = values.shape
    touched = values != 0
    first, last = touched.argmax(1), length - touched[:, ::-1].argmax(1)
    last[~touched.any(1)] = 1  # a row of zeros touches its first column
    # only rows of a square matrix stay where they are, so that windows are as far apart as their rows
    tile = max(n for n in range(1, min(TILE, rows) + 1) if rows % n == 0) if rows == length else rows
    tile = tile if 4 * tile > TILE else rows
    starts = np.arange(0, length, length // (rows // tile)) if rows > tile else np.zeros(1, int)
    margin = max(0, int((starts - first.reshape(-1, tile).min(1)).max()))
    width = int((last.reshape(-1, tile).max(1) - starts).max()) + margin
    wide = np.zeros((rows, length + margin + width), values.dtype)
    wide[:, margin : margin + length] = values
    stack = [wide[n * tile : (n + 1) * tile, begin : begin + width] for n, begin in enumerate(starts)]
    return Bands((rows, length), banded_parts(matrix, TILE), torch.from_numpy(np.stack(stack)), margin)


def along_axes(volume: Tensor, matrices: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
    """Multiply each axis of ``volume`` (D, H, W) by a matrix (new length, length) on the CPU; None leaves it.

    Args:
        volume: On any device; every value finite.
        matrices: One an axis.
        out: Where to write the result; may be ``volume``. None for a new tensor.

    Returns:
        A volume of the new lengths, on the device of ``volume``.
    """
    if volume.device.type == "cpu":
        split = {id(m): bands(m) for m in matrices if m is not None}
        depth, height, width = (None if m is None else split[id(m)] for m in matrices)
        return _Planes(volume, height, width).through(depth, out)
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            volume = torch.tensordot(to_device(matrix, volume.device), volume, ([1], [axis])).movedim(0, axis)
    return volume if out is None else out.copy_(volume)


class _Planes:
    """Planes of a volume on the CPU, filtered within each plane, a few at a time, and kept while they are needed."""

    def __init__(self, volume: Tensor, height: Bands | None, width: Bands | None) -> None:
        self.volume, self.height, self.width = volume, height, width
        self.together = max(PLANES, 2 * VOXELS // volume[0].numel())
        self.edges = [n if m is None else m.shape[0] for n, m in zip(volume.shape[1:], (height, width), strict=True)]
        if height is not None:
            rows = self.together * volume.shape[1]
            # windows of rows reach into the next plane, where they are multiplied by zero
            self.scratch = volume.new_zeros(height.margin + rows + height.stack.shape[2], self.edges[1])
            self.stacks = height.stack.repeat(self.together, 1, 1)

    def through(self, depth: Bands | None, out: Tensor | None) -> Tensor:
        """Filter within planes, then along the depth."""
        length = len(self.volume)
        result = self.volume.new_empty(length if depth is None else depth.shape[0], *self.edges) if out is None else out
        flat = result.view(len(result), -1) if result.is_contiguous() else None
        parts: list[tuple[slice, slice, Tensor | None]]
        if depth is None:
            edges = [*range(0, length, self.together), length]
            parts = [(slice(a, b), slice(a, b), None) for a, b in pairwise(edges)]
        else:
            parts = [
                (
                    slice(rows.start + inner.start, rows.start + inner.stop),
                    slice(columns.start + touched.start, columns.start + touched.stop),
                    piece,
                )
                for rows, columns, values in depth.parts
                for inner, touched, piece in banded_parts(values, self.together)
            ]
        # planes that a step and those after it read, and, as ``out`` may be ``volume``, those that it writes
        unread = list(accumulate((columns.start for _, columns, _ in reversed(parts)), min))[::-1]
        needed = [min(length, max(rows.stop, columns.stop)) for rows, columns, _ in parts]
        window = max(stop - first for first, stop in zip(unread, accumulate(needed, max), strict=True))
        self.kept = self.volume.new_empty(min(length, window + 4 * self.together), *self.edges)
        self.first = self.stop = 0
        for (rows, columns, values), first, stop in zip(parts, unread, needed, strict=True):
            self._read(first, stop)
            planes = self.kept[columns.start - self.first : columns.stop - self.first]
            if values is None:
                result[rows] = planes
            elif flat is None:
                result[rows] = torch.mm(values, planes.view(len(planes), -1)).view(-1, *self.edges)
            else:
                torch.mm(values, planes.view(len(planes), -1), out=flat[rows])
        return result

    def _read(self, first: int, stop: int) -> None:
        """Filter planes up to ``stop``; those before ``first`` may go."""
        while self.stop < stop:
            planes = self.volume[self.stop : self.stop + self.together]
            if self.stop - self.first + len(planes) > len(self.kept):
                still = self.kept[first - self.first : self.stop - self.first].clone()
                self.kept[: len(still)] = still
                self.first = first
            place = self.stop - self.first
            self._filter(planes, self.kept[place : place + len(planes)])
            self.stop += len(planes)

    def _filter(self, planes: Tensor, out: Tensor) -> None:
        """(n, H, W) -> (n, new H, new W)."""
        if self.height is None:
            self._along_width(planes, out)
            return
        margin, (tiles, rows, columns), width = self.height.margin, self.height.stack.shape, self.edges[1]
        number, height = planes.shape[:2]
        self._along_width(planes, self.scratch[margin : margin + number * height].view(number, height, width))
        windows = self.scratch.as_strided((number * tiles, columns, width), (height // tiles * width, width, 1))
        torch.bmm(self.stacks[: number * tiles], windows, out=out.view(number * tiles, rows, width))

    def _along_width(self, planes: Tensor, out: Tensor) -> None:
        """(n, H, W) -> (n, H, new W)."""
        if self.width is None:
            out.copy_(planes)
            return
        flat, flat_out = planes.reshape(-1, planes.shape[2]), out.view(-1, out.shape[2])
        for rows, columns, values in self.width.parts:
            torch.mm(flat[:, columns], values.T, out=flat_out[:, rows])


def banded_parts(matrix: Tensor, most: int) -> list[tuple[slice, slice, Tensor]]:
    """A matrix in pieces of ``most`` rows at most, each with the columns in which it is not all zero, at least one."""
    parts = []
    for begin in range(0, len(matrix), most):
        piece = matrix[begin : begin + most]
        touched = np.flatnonzero(piece.numpy().any(0))
        low, high = (int(touched[0]), int(touched[-1]) + 1) if len(touched) else (0, 1)
        parts.append((slice(begin, begin + len(piece)), slice(low, high), piece[:, low:high].contiguous()))
    return parts
