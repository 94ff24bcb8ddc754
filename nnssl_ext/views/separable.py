"""Separable linear filters: one matrix along each axis of a volume, as matrix products.

A product with a small dense matrix runs at the full speed of the arithmetic units, which direct 3-D convolutions of one
channel do not: a Gaussian of 128^3 voxels takes a seventh of their time on a CPU core.

D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from nnssl_ext.views.slabs import VOXELS

#: On the CPU: planes, at least, that go through all three products at a time while they are in the core's cache; and
#: rows of a banded matrix that are multiplied at a time, with no more columns than they touch.
PLANES, TILE = 8, 64


class _Part(NamedTuple):
    """Some rows of a matrix, and the columns in which they are not all zero."""

    rows: slice
    columns: slice
    values: Tensor


def along_axes(volume: Tensor, matrices: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
    """Multiply each axis of ``volume`` (D, H, W) by a matrix (new length, length) on the CPU; None leaves it.

    Args:
        volume: On any device.
        matrices: One an axis.
        out: Where to write the result; may be ``volume``. None for a new tensor.

    Returns:
        A volume of the new lengths, on the device of ``volume``.
    """
    if volume.device.type == "cpu":
        lengths = [n if matrix is None else len(matrix) for n, matrix in zip(volume.shape, matrices, strict=True)]
        return _by_planes(volume, matrices, volume.new_empty(lengths) if out is None else out)
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            volume = torch.tensordot(matrix.to(volume.device), volume, ([1], [axis])).movedim(0, axis)
    return volume if out is None else out.copy_(volume)


def _by_planes(volume: Tensor, matrices: Sequence[Tensor | None], out: Tensor) -> Tensor:
    depth, height, width = matrices
    together = max(PLANES, VOXELS // volume[0].numel())
    steps = _planes(len(volume), together) if depth is None else _parts(depth, together)
    rows = None if height is None else _parts(height, TILE)
    columns = rows if width is height else None if width is None else _parts(width, TILE)
    # from which plane on this and later steps read: what lies before may be written, even if ``out`` is ``volume``
    unread = list(accumulate((step.columns.start for step in reversed(steps)), min))[::-1]
    waiting: list[tuple[slice, Tensor]] = []
    for step, first in zip(steps, unread, strict=True):
        while waiting and waiting[0][0].stop <= first:
            done, planes = waiting.pop(0)
            out[done] = planes
        planes = volume[step.columns]
        if depth is not None:
            planes = torch.mm(step.values, planes.reshape(len(planes), -1)).view(-1, *volume.shape[1:])
        planes = planes if rows is None else _multiply_rows(planes, rows)
        planes = planes if columns is None else _multiply_columns(planes, columns)
        waiting.append((step.rows, planes))
    for done, planes in waiting:
        out[done] = planes
    return out


def _multiply_rows(planes: Tensor, parts: list[_Part]) -> Tensor:
    """(n, H, W) -> (n, new H, W)."""
    products = [torch.bmm(part.values.expand(len(planes), -1, -1), planes[:, part.columns]) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _multiply_columns(planes: Tensor, parts: list[_Part]) -> Tensor:
    """(n, H, W) -> (n, H, new W)."""
    result = planes.new_empty(*planes.shape[:2], parts[-1].rows.stop)
    flat, flat_result = planes.reshape(-1, planes.shape[2]), result.view(-1, result.shape[2])
    for part in parts:
        torch.mm(flat[:, part.columns], part.values.T, out=flat_result[:, part.rows])
    return result


def _planes(depth: int, most: int) -> list[_Part]:
    """Planes that stay where they are, ``most`` at a time."""
    places = [slice(begin, min(begin + most, depth)) for begin in range(0, depth, most)]
    return [_Part(place, place, torch.empty(0)) for place in places]


def _parts(matrix: Tensor, most: int) -> list[_Part]:
    """A matrix in pieces of ``most`` rows."""
    touched = matrix.numpy() != 0
    first, last = touched.argmax(1), touched.shape[1] - touched[:, ::-1].argmax(1)
    last[~touched.any(1)] = 1  # a row of zeros touches its first column
    parts = []
    for begin in range(0, len(matrix), most):
        rows = slice(begin, min(begin + most, len(matrix)))
        columns = slice(int(first[rows].min()), int(last[rows].max()))
        parts.append(_Part(rows, columns, matrix[rows, columns].contiguous()))
    return parts
