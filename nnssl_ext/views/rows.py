"""Rows of patches along a direction, for predicting some from others.

B batch, R rows that are read, Q columns of a row. See ``layout`` for how patches and windows are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from nnssl_ext.errors import UserError
from nnssl_ext.views.layout import Edges, magnification, nothing_fits, patch_sizes


@dataclass(frozen=True)
class Rows:
    """How rows follow each other: ``context`` rows that are seen, ``skipped`` ones, ``predicted`` ones."""

    context: int
    skipped: int
    predicted: int
    overlap: float

    @property
    def read(self) -> list[int]:
        """Places of the rows that are read: the skipped ones are not."""
        first = self.context + self.skipped
        return [*range(self.context), *range(first, first + self.predicted)]

    def pitch(self, edge: int) -> int:
        """From one row to the next, in voxels, for patches with this edge."""
        return max(1, math.ceil(edge * (1 - self.overlap)))

    def length(self, edge: int) -> int:
        """Voxels that all rows take."""
        return (self.context + self.skipped + self.predicted - 1) * self.pitch(edge) + edge


@dataclass(frozen=True)
class RowLayout:
    """Rows along some axes, columns side by side along the other two.

    Attributes:
        rows: See there.
        patch: Edges of a patch in voxels.
        columns: Patches side by side along each axis when rows run along another.
        axes: Axes along which rows may run.
        window: Edges of the window that holds any direction.
        stages: How many encoder stages are read, and so trained.
        zoom: Magnification of the window.
    """

    rows: Rows
    patch: Edges
    columns: Edges
    axes: tuple[int, ...]
    window: Edges
    stages: int
    zoom: float

    def beside(self, axis: int) -> int:
        """Columns of a row that runs along ``axis``."""
        return math.prod(self.columns) // self.columns[axis]

    def starts(self, direction: Tensor, place: Tensor) -> Tensor:
        """Lowest voxel of each patch, row by row.

        Args:
            direction: (B,) 2 k for rows that run up along the k-th of ``axes``, 2 k + 1 for down.
            place: (B, 3) in [0, 1), where in the room that the window leaves.

        Returns:
            (B, R Q, 3).
        """
        return torch.stack([self._starts(int(d), p) for d, p in zip(direction, place, strict=True)])

    def _starts(self, direction: int, place: Tensor) -> Tensor:
        along, pitch = self.axes[direction // 2], self.rows.pitch(self.patch[self.axes[direction // 2]])
        length = [n * edge for n, edge in zip(self.columns, self.patch, strict=True)]
        length[along] = self.rows.length(self.patch[along])
        last = self.rows.read[-1]
        places: list[Sequence[int]] = [[n * self.patch[a] for n in range(self.columns[a])] for a in range(3)]
        found = []
        for row in self.rows.read:
            places[along] = [(last - row if direction % 2 else row) * pitch]
            found += list(product(*places))
        room = torch.tensor([w - n for w, n in zip(self.window, length, strict=True)])
        return torch.tensor(found) + (place * (room + 1)).long().minimum(room)


def solve_rows(
    strides: Sequence[Sequence[int]],
    case_size: Sequence[int],
    rows: Rows,
    *,
    title: str,
    columns: int,
    most_zoom: float,
    most_voxels: float,
) -> RowLayout:
    """The layout at the deepest stage at which rows fit along any axis, with as many columns as may be.

    Args:
        strides: Cumulative stride of each encoder stage.
        case_size: Edges that cases have.
        rows: The rows.
        title: The method, for the message.
        columns: Most patches side by side along an axis.
        most_zoom: Largest magnification.
        most_voxels: Most voxels of all patches together, if there are fewer columns to take.

    Raises:
        UserError: If rows share voxels with what is predicted from them, or nothing fits.
    """
    room = [edge * most_zoom for edge in case_size]
    for stages, patch in patch_sizes(strides):
        if any((rows.skipped + 1) * rows.pitch(edge) < edge for edge in patch):
            raise UserError(
                f"{title}: with overlap {rows.overlap:g} and {rows.skipped} skipped rows, context and prediction share "
                f"voxels; skip more rows or overlap less"
            )
        axes = tuple(axis for axis in range(3) if rows.length(patch[axis]) <= room[axis])
        if not axes or any(edge > most for edge, most in zip(patch, room, strict=True)):
            continue
        for most in range(columns, 0, -1):
            beside = [max(1, min(most, int(room[axis] // patch[axis]))) for axis in range(3)]
            # rows along any of the axes must have equally many columns
            for axis in axes:
                beside[axis] = min(beside[a] for a in axes)
            window = [n * edge for n, edge in zip(beside, patch, strict=True)]
            for axis in axes:
                window[axis] = max(window[axis], rows.length(patch[axis]))
            shown = (window[0], window[1], window[2])
            zoom = magnification(shown, case_size)
            layout = RowLayout(rows, patch, (beside[0], beside[1], beside[2]), axes, shown, stages, zoom)
            if most == 1 or len(rows.read) * layout.beside(axes[0]) * math.prod(patch) <= most_voxels:
                return layout
    raise nothing_fits(title, f"{rows.context + rows.skipped + rows.predicted} rows", strides, case_size, most_zoom)
