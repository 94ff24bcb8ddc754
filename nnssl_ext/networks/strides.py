"""Strides of networks whose number of stages is their own choice, from the spacing of the data."""

from __future__ import annotations

from collections.abc import Sequence

#: An axis whose voxels are this many times as long as the shortest is not halved yet, as in nnU-Net's planning.
THICK = 2.0


def halving_strides(spacing: Sequence[float], levels: int) -> list[list[int]]:
    """Strides from stage to stage that halve an axis once its voxels are no longer much longer than the others.

    Args:
        spacing: Voxel edges in mm.
        levels: How many halvings the axes with the shortest voxels get.

    Example:
        ``halving_strides((5, 1, 1), 3)`` is ``[[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]``.
    """
    edges, strides = list(spacing), [[1] * len(spacing)]
    for _ in range(levels):
        shortest = min(edges)
        step = [2 if edge < THICK * shortest else 1 for edge in edges]
        edges = [edge * factor for edge, factor in zip(edges, step, strict=True)]
        strides.append(step)
    return strides
