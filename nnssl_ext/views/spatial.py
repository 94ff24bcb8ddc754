"""Spatial views: flips, quarter turns and one affine resampling, drawn apart from applied.

B batch, C channel, D H W voxels. A draw is a 3x3 matrix M in voxel coordinates: the voxel o of a crop with edges s,
counted from the crop's centre, comes from the source point ``centre + M (o - (s - 1) / 2)``. The worker that reads a
case knows M beforehand, so it reads just the box that M reaches; the device resamples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Above this ratio of spacings nnU-Net too turns in the plane of the thin slices alone.
ANISOTROPY_LIMIT = 3.0


@dataclass(frozen=True)
class SpatialRange:
    """What a spatial view may do; all zero is the identity.

    Args:
        spacing: Voxel edges in mm, one per axis; rotations are rotations in mm.
        flip: Probability of a mirror, per axis.
        rot90: Probability of quarter turns in a plane whose two axes agree in spacing and crop edge.
        affine: Probability of a rotation and zoom.
        rotation: Largest angle about each axis, in degrees.
        zoom: Smallest and largest magnification.
    """

    spacing: tuple[float, ...]
    flip: float = 0.0
    rot90: float = 0.0
    affine: float = 0.0
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)

    def draw(self, generator: np.random.Generator, size: Sequence[int]) -> np.ndarray:
        """Draw one matrix (3, 3) for a crop with edges ``size``."""
        matrix = np.diag(np.where(generator.random(3) < self.flip, -1.0, 1.0))
        quarter, plane_at, quarters = generator.random(), generator.random(), int(generator.integers(1, 4))
        planes = self._square_planes(size)
        if planes and quarter < self.rot90:
            matrix = matrix @ _quarter_turn(planes[int(plane_at * len(planes))], quarters)
        bend, zoom = generator.random(), generator.uniform(*self.zoom)
        angles = generator.uniform(-self.rotation, self.rotation, 3)
        if bend < self.affine and (self.rotation or self.zoom != (1.0, 1.0)):
            matrix = turn(np.where(self.turning_axes(), angles, 0.0), self.spacing) @ matrix / zoom
        return matrix

    def _square_planes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        return [
            (a, b)
            for a, b in ((0, 1), (0, 2), (1, 2))
            if size[a] == size[b] and abs(self.spacing[a] / self.spacing[b] - 1) < 0.01
        ]

    def turning_axes(self) -> np.ndarray:
        """(3,) bool: about which axes a crop may be turned by any angle."""
        spacing = np.asarray(self.spacing)
        if spacing.max() / spacing.min() < ANISOTROPY_LIMIT:
            return np.ones(3, bool)
        return spacing == spacing.max()


@dataclass
class SourceBox:
    """A box read from a case, and where a crop lies in it.

    Attributes:
        data: (C, d, h, w), the box clipped to the volume; nothing outside the volume is stored.
        matrix: (3, 3) as above.
        centre: The crop's centre in voxels of ``data``; may lie outside.
        case: The case's identifier.
    """

    data: Tensor
    matrix: np.ndarray
    centre: np.ndarray
    case: str = ""

    def pin_memory(self) -> SourceBox:
        return SourceBox(self.data.pin_memory(), self.matrix, self.centre, self.case)


def reach(matrix: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Half extents (3,) in voxels of the source region that a crop with edges ``size`` needs around its centre."""
    return np.abs(matrix) @ ((np.asarray(size) - 1) / 2)


def fitted(matrix: np.ndarray, size: Sequence[int], room: np.ndarray) -> np.ndarray:
    """``matrix``, shrunk alike along all axes until a crop of ``size`` reaches no farther than ``room`` (3,)."""
    half = reach(matrix, size)
    wanted = half > room
    return matrix * (room[wanted] / half[wanted]).min(initial=1.0)


def part(
    box: SourceBox, size: Sequence[int], view: np.ndarray, place: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0)
) -> SourceBox:
    """A view within the region that was read for a crop: never anything outside it, so never padding.

    Args:
        box: What was read.
        size: Edges of the crop and of the view, in voxels.
        view: (3, 3), from voxels of the view to voxels of the crop; shrunk where it would leave the crop.
        place: Where the room that is left is used, in [-1, 1] per axis; 0 is the middle.
    """
    room = reach(box.matrix, size)
    matrix = fitted(box.matrix @ view, size, room)
    left = np.maximum(room - reach(matrix, size), 0)
    return SourceBox(box.data, matrix, box.centre + np.asarray(place) * left, box.case)


def turn(angles: Sequence[float] | np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """The matrix (3, 3) in voxels of a rotation in mm by ``angles`` (3,) in degrees about the three axes."""
    edges = np.asarray(spacing)
    return _rotation(np.deg2rad(angles)) * edges[None, :] / edges[:, None]


def cut(box: SourceBox, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut one crop out of its box: a copy where M is a signed permutation, a trilinear resampling otherwise.

    Returns:
        The crop (C, D, H, W) float32, zero outside the volume (nnU-Net's padding), and ``inside`` (1, D, H, W) bool.
    """
    data = box.data.to(device, torch.float32, non_blocking=True)
    axes = np.abs(box.matrix).argmax(1)
    if np.array_equal(np.abs(box.matrix), np.eye(3)[axes]):
        return _copy(data, box, size, axes)
    return _resample(data, box, size)


def cut_batch(boxes: Sequence[SourceBox], size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut one crop of each box: (B, C, D, H, W) and ``inside`` (B, 1, D, H, W)."""
    crops, insides = zip(*(cut(box, size, device) for box in boxes), strict=True)
    return torch.stack(crops), torch.stack(insides)


def _copy(data: Tensor, box: SourceBox, size: Sequence[int], axes: np.ndarray) -> tuple[Tensor, Tensor]:
    # the crop before it is turned: its edges along the source's axes, its lowest voxel in the box
    edges = [0, 0, 0]
    for source_axis, crop_axis in enumerate(axes):
        edges[source_axis] = size[crop_axis]
    low = np.rint(box.centre - (np.asarray(edges) - 1) / 2).astype(int)
    begin = np.clip(low, 0, data.shape[1:])
    end = np.clip(low + edges, begin, data.shape[1:])
    source = (slice(None), *(slice(b, e) for b, e in zip(begin, end, strict=True)))
    target = (slice(None), *(slice(b, e) for b, e in zip(begin - low, end - low, strict=True)))
    crop = data.new_zeros((data.shape[0], *edges))
    inside = torch.zeros((1, *edges), dtype=torch.bool, device=data.device)
    crop[target] = data[source]
    inside[target] = True

    # source axis a runs along crop axis axes[a]; bring the crop's axes to their order, then mirror
    order = [0, *(1 + int(np.flatnonzero(axes == crop_axis)[0]) for crop_axis in range(3))]
    mirrored = [1 + crop_axis for crop_axis in range(3) if box.matrix[:, crop_axis].sum() < 0]
    return crop.permute(order).flip(mirrored), inside.permute(order).flip(mirrored)


def _resample(data: Tensor, box: SourceBox, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    # grid_sample's coordinates (align_corners=False): voxel x of n lies at (2 x + 1) / n - 1, axes in reverse order
    edges = np.asarray(data.shape[1:], dtype=float)
    theta = np.empty((3, 4))
    theta[:, :3] = box.matrix * np.asarray(size)[None, :] / edges[:, None]
    theta[:, 3] = (2 * box.centre + 1) / edges - 1
    theta = theta[::-1, [2, 1, 0, 3]].copy()
    grid = F.affine_grid(
        torch.from_numpy(theta)[None].to(data.device, torch.float32), [1, 1, *size], align_corners=False
    )
    inside = (grid.abs() <= 1).all(-1)  # (1, D, H, W)
    crop = F.grid_sample(data[None], grid, padding_mode="border", align_corners=False)[0]
    return crop * inside, inside


def _rotation(angles: np.ndarray) -> np.ndarray:
    result = np.eye(3)
    for axis, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        cos, sin = np.cos(angles[axis]), np.sin(angles[axis])
        turn = np.eye(3)
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = cos, -sin, sin, cos
        result = result @ turn
    return result


def _quarter_turn(plane: tuple[int, int], quarters: int) -> np.ndarray:
    a, b = plane
    turn = np.eye(3)
    turn[a, a] = turn[b, b] = 0.0
    turn[a, b], turn[b, a] = -1.0, 1.0
    return np.linalg.matrix_power(turn, quarters)
