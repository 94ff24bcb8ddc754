"""Rows of patches along a direction, for predicting some from others.

B batch, R rows that are read, Q columns of a row. See ``layout`` for how patches and windows are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from nnssl_ext.views.layout import Edges, magnification, moves, nothing_fits, patch_sizes, sized


@dataclass(frozen=True)
class Rows:
    """How rows follow each other: ``context`` rows that are seen, ``skipped`` ones, ``predicted`` ones.

    Attributes:
        context, skipped, predicted: Numbers of rows.
        overlap: Of a row with the next, as a share of a patch's edge.
        gap: Least distance of context and prediction, as a share of a patch's edge: nearer faces are alike.
        room: Voxels that come on top, by which patches of a magnified window may be moved.
    """

    context: int
    skipped: int
    predicted: int
    overlap: float
    gap: float = 0.0
    room: int = 0

    @property
    def read(self) -> list[int]:
        """Places of the rows that are read: the skipped ones are not."""
        first = self.context + self.skipped
        return [*range(self.context), *range(first, first + self.predicted)]

    def pitch(self, edge: int) -> int:
        """From one row to the next, in voxels, for patches with this edge."""
        return max(1, math.ceil(edge * (1 - self.overlap)))

    def shift(self, edge: int) -> int:
        """Voxels by which the predicted rows lie farther away than pitch and skipped rows say."""
        distance = (self.skipped + 1) * self.pitch(edge) - edge
        return max(0, math.ceil(self.gap * edge) + self.room - distance)

    def begin(self, row: int, edge: int) -> int:
        """The lowest voxel of a row."""
        return row * self.pitch(edge) + (self.shift(edge) if row >= self.context else 0)

    def length(self, edge: int) -> int:
        """Voxels that all rows take."""
        return self.begin(self.context + self.skipped + self.predicted - 1, edge) + edge


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

    def __str__(self) -> str:
        rows = f"{len(self.rows.read)} rows of {self.beside(self.axes[0])} patches of {sized(self.patch)} voxels"
        window = f"in a window of {sized(self.window)}, magnified {self.zoom:.2f} times, along {len(self.axes)} axes"
        return f"{rows} {window}; {self.stages} encoder stages are read"

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
        along = self.axes[direction // 2]
        length = [n * edge for n, edge in zip(self.columns, self.patch, strict=True)]
        length[along] = self.rows.length(self.patch[along])
        edge, last = self.patch[along], self.rows.read[-1]
        end = self.rows.begin(last, edge)
        places: list[Sequence[int]] = [[n * self.patch[a] for n in range(self.columns[a])] for a in range(3)]
        found = []
        for row in self.rows.read:
            begin = self.rows.begin(row, edge)
            places[along] = [end - begin if direction % 2 else begin]
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
        UserError: If nothing fits.
    """
    for stages, patch in patch_sizes(strides):
        for most in range(columns, 0, -1):
            layout = _magnified(rows, patch, stages, most, case_size, most_zoom)
            if layout is None:
                continue
            if most == 1 or len(rows.read) * layout.beside(layout.axes[0]) * math.prod(patch) <= most_voxels:
                return layout
    windows = []
    for _, patch in patch_sizes(strides):
        for axis in range(3):
            edges = [rows.length(edge) if a == axis else edge for a, edge in enumerate(patch)]
            windows.append((edges[0], edges[1], edges[2]))
    number = rows.context + rows.skipped + rows.predicted
    raise nothing_fits(title, f"{number} rows", strides, case_size, most_zoom, windows)


def _magnified(
    rows: Rows, patch: Edges, stages: int, most: int, case_size: Sequence[int], most_zoom: float
) -> RowLayout | None:
    """The layout of this patch with at most so many columns, with distances that are kept though patches are moved."""
    space, room = [edge * most_zoom for edge in case_size], 0
    while True:
        here = replace(rows, room=room)
        axes = tuple(axis for axis in range(3) if here.length(patch[axis]) <= space[axis])
        if not axes or any(edge > largest for edge, largest in zip(patch, space, strict=True)):
            return None
        beside = [max(1, min(most, int(space[axis] // patch[axis]))) for axis in range(3)]
        # rows along any of the axes must have equally many columns
        for axis in axes:
            beside[axis] = min(beside[a] for a in axes)
        window = [n * edge for n, edge in zip(beside, patch, strict=True)]
        for axis in axes:
            window[axis] = max(window[axis], here.length(patch[axis]))
        shown = (window[0], window[1], window[2])
        zoom = magnification(shown, case_size)
        if moves(zoom) <= room:
            return RowLayout(here, patch, (beside[0], beside[1], beside[2]), axes, shown, stages, zoom)
        room = moves(zoom)
