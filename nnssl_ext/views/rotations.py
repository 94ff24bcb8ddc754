"""Rotations that map a voxel grid to itself.

D H W voxels. Such a rotation is one by multiples of 90 degrees, a signed permutation of the axes. One that exchanges
axes of different spacing changes how an image looks on its grid, so the spacing alone would reveal it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
from scipy.spatial.transform import Rotation
from torch import Tensor

from nnssl_ext.networks.base import Triple, triple

#: Relative difference below which spacings count as equal.
TOLERANCE = 0.01


def cube_group() -> list[np.ndarray]:
    """List the 24 rotations of the cube, the identity first: (3, 3) each."""
    group = []
    for order in permutations(range(3)):
        for signs in product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                group.append(matrix)
    return group


def published_rotations() -> list[np.ndarray]:
    """List the 10 rotations of Taleb et al. 2020: none, and 90, 180 and 270 degrees about each axis."""
    return [rotation for rotation in cube_group() if sum(rotation[axis, axis] == 1 for axis in range(3))]


def same_spacing(spacing: Sequence[float]) -> np.ndarray:
    """Compare the spacings of all pairs of axes: (3, 3) bool."""
    edges = np.asarray(spacing)
    return abs(edges[:, None] / edges[None, :] - 1) < TOLERANCE


def grid_rotations(rotations: Sequence[np.ndarray], spacing: Sequence[float]) -> list[np.ndarray]:
    """Select the rotations that keep a grid."""
    alike = same_spacing(spacing)
    return [rotation for rotation in rotations if not (np.abs(rotation) > alike).any()]


def rotate_back(image: Tensor, rotation: np.ndarray) -> Tensor:
    """Undo a rotation of (..., D, H, W), which was sampled at ``rotation @ place``."""
    order, lead = np.abs(rotation).argmax(1), image.ndim - 3
    turned = image.permute(*range(lead), *(lead + axis for axis in order.tolist()))
    return turned.flip([lead + axis for axis in range(3) if rotation[axis, order[axis]] < 0])


def rotation_name(rotation: np.ndarray) -> str:
    """Format a rotation as an angle about an axis of the grid, such as '90° about D'."""
    vector = np.degrees(Rotation.from_matrix(rotation).as_rotvec())
    angle, largest = np.linalg.norm(vector), np.abs(vector).max()
    if angle < 1:
        return "0°"
    parts = [
        ("-" if part < 0 else "+") + name for part, name in zip(vector, "DHW", strict=True) if abs(part) > largest / 2
    ]
    return f"{angle:.0f}° about {''.join(parts).removeprefix('+')}"


def rotatable_size(size: Sequence[int], steps: Sequence[int], alike: np.ndarray) -> Triple:
    """Find the largest box with equal edges along ``alike`` axes.

    Edges are multiples of ``steps``, at least two steps even if the crop is smaller. ``alike`` is (3, 3) bool.
    """
    edges = []
    for axis in range(3):
        group = np.flatnonzero(alike[axis]).tolist()
        step = int(np.lcm.reduce([steps[a] for a in group]))
        room = min(size[a] for a in group)
        edges.append(max(room // step, 2 if step > 1 else 1) * step)
    return triple(edges)
