"""Choose strides from the spacing of the data."""

from __future__ import annotations

from collections.abc import Sequence

#: Ratio to the shortest voxel edge from which an axis is not halved, as in nnU-Net's planning.
THICK = 2.0


def halving_strides(spacing: Sequence[float], levels: int) -> list[list[int]]:
    """Halve an axis once its voxels are long enough.

    Returns the strides from stage to stage.

    Args:
        spacing: Voxel edges in mm.
        levels: Halvings of the axes with the shortest voxels.

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
