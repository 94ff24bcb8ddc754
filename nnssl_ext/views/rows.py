"""Solve the layout of rows of patches.

See ``layout`` for the choice of patches and windows.

B batch, R rows that are read, Q columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.networks.base import Triple, triple
from nnssl_ext.views.layout import (
    format_edges,
    longest_edge,
    magnification,
    nothing_fits,
    patch_sizes,
    patch_zoom,
    shift_room,
)


@dataclass(frozen=True)
class Rows:
    """Describe a sequence: context, skipped and predicted rows.

    Attributes:
        context, skipped, predicted: Numbers of rows.
        overlap: Overlap of consecutive rows, as a share of a patch's edge.
        gap: Least distance of context and prediction, as a share of a patch's edge. Nearer faces are alike.
        room: Voxels on top of the gap, by which patches of a magnified window may be shifted.
    """

    context: int
    skipped: int
    predicted: int
    overlap: float
    gap: float = 0.0
    room: int = 0

    @property
    def read(self) -> list[int]:
        """Return the places of rows that are read."""
        first = self.context + self.skipped
        return [*range(self.context), *range(first, first + self.predicted)]

    def pitch(self, edge: int) -> int:
        """Compute the distance of rows in voxels."""
        return max(1, math.ceil(edge * (1 - self.overlap)))

    def offset(self, edge: int) -> int:
        """Compute the extra distance of predicted rows. It keeps the gap, in voxels."""
        distance = (self.skipped + 1) * self.pitch(edge) - edge
        return max(0, math.ceil(self.gap * edge) + self.room - distance)

    def begin(self, row: int, edge: int) -> int:
        """Compute the lowest voxel of a row."""
        return row * self.pitch(edge) + (self.offset(edge) if row >= self.context else 0)

    def length(self, edge: int) -> int:
        """Compute the voxels that all rows take."""
        return self.begin(self.context + self.skipped + self.predicted - 1, edge) + edge


@dataclass(frozen=True)
class RowLayout:
    """Lay rows along axes, columns side by side.

    Attributes:
        rows: The sequence of rows.
        patch: Edges of a patch in voxels.
        columns: Patches side by side along each axis, when rows run along another.
        axes: Axes along which rows may run.
        window: Edges of the window that holds any direction.
        stages: Encoder stages that are run and trained.
        zoom: Magnification of the window.
    """

    rows: Rows
    patch: Triple
    columns: Triple
    axes: tuple[int, ...]
    window: Triple
    stages: int
    zoom: float

    #: The direction is drawn after the window is read, so the window's body is looked at as a whole.
    middles = ()

    def __str__(self) -> str:
        rows = f"{len(self.rows.read)} rows of {self.columns_of(self.axes[0])} patches"
        window = f"a window of {format_edges(self.window)}, magnified {self.zoom:.2f} times"
        return (
            f"{rows} of {format_edges(self.patch)} voxels in {window}, along {len(self.axes)} axes; "
            f"{self.stages} encoder stages are trained"
        )

    def columns_of(self, axis: int) -> int:
        """Count the columns of a row along ``axis``."""
        return math.prod(self.columns) // self.columns[axis]

    def overlaps(self) -> np.ndarray:
        """Find patches that share voxels: (R Q, R Q) bool."""
        columns = self.columns_of(self.axes[0])
        row, column = np.divmod(np.arange(len(self.rows.read) * columns), columns)
        shared = np.zeros((len(row), len(row)), bool)
        for axis in self.axes:
            edge = self.patch[axis]
            begin = np.array([self.rows.begin(number, edge) for number in self.rows.read])[row]
            shared |= abs(begin[:, None] - begin) < edge
        return shared & (column[:, None] == column) & (row[:, None] != row)

    def starts(self, direction: Tensor, place: Tensor) -> Tensor:
        """Compute the lowest voxel of each patch, row by row.

        Args:
            direction: (B,) 2 k for rows that run up along the k-th of ``axes``, 2 k + 1 for down.
            place: (B, 3) in [0, 1), position in the room that the window leaves.

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
    max_columns: int,
    max_zoom: float,
    max_voxels: float,
) -> RowLayout:
    """Find the deepest layout with most columns.

    Rows are magnified only where they fit at no stage. Arguments and error are those of ``layout.solve_layout``.
    ``max_columns`` is the number of patches side by side along an axis, at most.
    """
    candidates = []
    for stages, patch in patch_sizes(strides):
        for columns, zoom in product(range(max_columns, 0, -1), (1.0, max_zoom)):
            layout = _magnify(rows, patch, stages, columns, case_size, zoom)
            if layout is None:
                continue
            voxels = len(rows.read) * layout.columns_of(layout.axes[0]) * math.prod(patch)
            if columns == 1 or voxels <= max_voxels:
                candidates.append(layout)
    if candidates:
        return max(candidates, key=lambda layout: (-layout.zoom, layout.stages, math.prod(layout.columns)))
    windows, spaced = [], replace(rows, room=shift_room(max_zoom))
    for _, patch in patch_sizes(strides):
        for axis in range(3):
            edges = [spaced.length(edge) if a == axis else edge for a, edge in enumerate(patch)]
            windows.append(triple(edges))
    number = rows.context + rows.skipped + rows.predicted
    raise nothing_fits(title, f"{number} rows", strides, case_size, max_zoom, windows)


def _magnify(
    rows: Rows, patch: Triple, stages: int, max_columns: int, case_size: Sequence[int], max_zoom: float
) -> RowLayout | None:
    """Build this patch's layout, with room for shifts. None if it does not fit."""
    space, room = [longest_edge(edge, max_zoom) for edge in case_size], 0
    while True:
        spaced = replace(rows, room=room)
        axes = tuple(axis for axis in range(3) if spaced.length(patch[axis]) <= space[axis])
        if not axes or any(edge > largest for edge, largest in zip(patch, space, strict=True)):
            return None
        columns = [max(1, min(max_columns, int(space[axis] // patch[axis]))) for axis in range(3)]
        # rows along any of the axes must have equally many columns
        for axis in axes:
            columns[axis] = min(columns[a] for a in axes)
        edges = [n * edge for n, edge in zip(columns, patch, strict=True)]
        for axis in axes:
            edges[axis] = max(edges[axis], spaced.length(patch[axis]))
        window = triple(edges)
        zoom = magnification(window, case_size)
        if shift_room(zoom) <= room:
            if patch_zoom(window, zoom, case_size) > max_zoom:
                return None
            return RowLayout(spaced, patch, triple(columns), axes, window, stages, zoom)
        room = shift_room(zoom)
