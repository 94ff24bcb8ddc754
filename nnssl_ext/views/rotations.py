"""Turns that map a voxel grid to itself, and how they are applied.

D H W voxels. A turn is a rotation by multiples of 90 degrees, a signed permutation of the axes. One that exchanges
axes of different voxel edges changes how an image looks on its grid: the turn could then be read off the spacing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import numpy as np

#: Spacings that differ by less are one.
SAME = 0.01


def cube_group() -> list[np.ndarray]:
    """The 24 rotations of the cube, the identity first: (3, 3) each."""
    group = []
    for order in permutations(range(3)):
        for signs in product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                group.append(matrix)
    return group


def published_turns() -> list[np.ndarray]:
    """The identity and 90, 180 and 270 degrees about each axis (Taleb et al.): 10 of the cube's 24 rotations."""
    return [turn for turn in cube_group() if sum(turn[axis, axis] == 1 for axis in range(3))]


def same_spacing(spacing: Sequence[float]) -> np.ndarray:
    """(3, 3) bool: which axes have one voxel edge."""
    edges = np.asarray(spacing)
    return abs(edges[:, None] / edges[None, :] - 1) < SAME


def grid_turns(turns: Sequence[np.ndarray], spacing: Sequence[float]) -> list[np.ndarray]:
    """Those of ``turns`` that map a grid of this spacing to itself."""
    alike = same_spacing(spacing)
    return [turn for turn in turns if not (np.abs(turn) > alike).any()]


def turnable_size(size: Sequence[int], steps: Sequence[int], alike: np.ndarray) -> tuple[int, int, int]:
    """The largest box within ``size`` whose edges are equal along axes that are ``alike``.

    Args:
        size: Edges of the crop.
        steps: What an edge must be a multiple of, and at least twice, per axis; where nothing fits, twice the step.
        alike: (3, 3) bool.
    """
    edges = []
    for axis in range(3):
        group = np.flatnonzero(alike[axis]).tolist()
        step = int(np.lcm.reduce([steps[a] for a in group]))
        room = min(size[a] for a in group)
        edges.append(max(room // step, 2 if step > 1 else 1) * step)
    depth, height, width = edges
    return depth, height, width
