"""Spatial views: flips, quarter turns and one affine resampling, drawn apart from applied.

B batch, C channel, D H W voxels. A draw is a 3x3 matrix M in voxel coordinates: the voxel o of a crop with edges s,
counted from the crop's center, comes from the source point ``center + M (o - (s - 1) / 2)``. The worker that reads a
case knows M beforehand, so it reads just the box that M reaches; the device resamples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.cpu.chunks import VOXELS
from nnssl_ext.views.random import to_device

#: Above this ratio of spacings nnU-Net too turns in the plane of the thin slices alone.
ANISOTROPY_LIMIT = 3.0
#: Voxels that are mirrored at a time on the CPU.
MIRRORED = 8 * VOXELS


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
            matrix = rotation_matrix(np.where(self.turning_axes(), angles, 0.0), self.spacing) @ matrix / zoom
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
        center: The crop's center in voxels of ``data``; may lie outside.
        case: The case's identifier.
    """

    data: Tensor
    matrix: np.ndarray
    center: np.ndarray
    case: str = ""

    def pin_memory(self) -> SourceBox:
        return SourceBox(self.data.pin_memory(), self.matrix, self.center, self.case)


def half_extent(matrix: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Half extents (3,) in voxels of the source region that a crop with edges ``size`` needs around its center."""
    return np.abs(matrix) @ ((np.asarray(size) - 1) / 2)


def shrink_to_fit(matrix: np.ndarray, size: Sequence[int], room: np.ndarray) -> np.ndarray:
    """``matrix``, shrunk alike along all axes until a crop of ``size`` reaches no farther than ``room`` (3,)."""
    half = half_extent(matrix, size)
    wanted = half > room
    return matrix * (room[wanted] / half[wanted]).min(initial=1.0)


def subview(
    box: SourceBox,
    size: Sequence[int],
    view: np.ndarray,
    place: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
    *,
    view_size: Sequence[int] | None = None,
) -> SourceBox:
    """A view within the region that was read for a crop: never anything outside it, so never padding.

    Args:
        box: What was read.
        size: Edges of the crop, in voxels.
        view: (3, 3), from voxels of the view to voxels of the crop; shrunk where it would leave the crop.
        place: Where the room that is left is used, in [-1, 1] per axis; 0 is the middle.
        view_size: Edges of the view; None for those of the crop.
    """
    edges = size if view_size is None else view_size
    room = half_extent(box.matrix, size)
    matrix = shrink_to_fit(box.matrix @ view, edges, room)
    left = np.maximum(room - half_extent(matrix, edges), 0)
    return SourceBox(box.data, matrix, box.center + np.asarray(place) * left, box.case)


def source_range(center: np.ndarray, half: np.ndarray, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 voxel (3,) that a crop with these half extents is made from, within the volume."""
    low = np.clip(np.floor(center - half + 1e-6), 0, volume - 1).astype(int)
    return low, np.clip(np.ceil(center + half - 1e-6) + 1, low + 1, volume).astype(int)


def is_constant(box: SourceBox, size: Sequence[int]) -> bool:
    """Whether all that a crop with edges ``size`` is made from has one value in each channel."""
    low, high = source_range(box.center, half_extent(box.matrix, size), np.asarray(box.data.shape[1:]))
    seen = box.data[(slice(None), *map(slice, low.tolist(), high.tolist()))]
    # two voxels nearly always tell it already
    if not torch.equal(seen[:, 0, 0, 0], seen[:, -1, -1, -1]):
        return False
    return torch.equal(seen.amin((1, 2, 3)), seen.amax((1, 2, 3)))


def rotation_matrix(angles: Sequence[float] | np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """The matrix (3, 3) in voxels of a rotation in mm by ``angles`` (3,) in degrees about the three axes."""
    edges = np.asarray(spacing)
    return _rotation(np.deg2rad(angles)) * edges[None, :] / edges[:, None]


def crop_box(box: SourceBox, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Cut one crop out of its box: a copy where M is a signed permutation, a trilinear resampling otherwise.

    Returns:
        The crop (C, D, H, W) float32, zero outside the volume (nnU-Net's padding); and ``inside`` (1, D, H, W) bool,
        or None where no voxel lies outside.
    """
    crop = torch.empty((len(box.data), *size), device=device)
    return crop, _cut(box, size, crop)


def crop_batch(
    boxes: Sequence[SourceBox], size: Sequence[int], device: torch.device, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cut one crop of each box: (B, C, D, H, W), and ``inside`` (B, 1, D, H, W) or None.

    With ``out``, of that shape, the crops are written there.
    """
    crops = torch.empty((len(boxes), len(boxes[0].data), *size), device=device) if out is None else out
    insides = [_cut(box, size, crop) for box, crop in zip(boxes, crops, strict=True)]
    if all(inside is None for inside in insides):
        return crops, None
    whole = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(1, *size)
    return crops, torch.stack([whole if inside is None else inside for inside in insides])


def _cut(box: SourceBox, size: Sequence[int], crop: Tensor) -> Tensor | None:
    """``cut`` into ``crop``; returns ``inside``."""
    data = box.data.to(crop.device, torch.float32, non_blocking=True)
    axes = _permuted(box.matrix)
    return _resample(data, box, size, crop) if axes is None else _copy(data, box, size, axes, crop)


def _permuted(matrix: np.ndarray) -> list[int] | None:
    """Along which axis of the crop each of the source's runs; None where ``matrix`` is no signed permutation."""
    rows = [[abs(value) for value in row] for row in matrix.tolist()]
    if any(sorted(line) != [0.0, 0.0, 1.0] for line in (*rows, *zip(*rows, strict=True))):
        return None
    return [row.index(1.0) for row in rows]


def _copy(data: Tensor, box: SourceBox, size: Sequence[int], axes: Sequence[int], crop: Tensor) -> Tensor | None:
    # plain integers: arrays of three would take longer than the copy of a small crop
    edges = [int(size[axis]) for axis in axes]
    low = [round(center - (edge - 1) / 2) for center, edge in zip(box.center.tolist(), edges, strict=True)]
    begin = [min(max(first, 0), length) for first, length in zip(low, data.shape[1:], strict=True)]
    end = [
        min(max(first + edge, start), length)
        for first, edge, start, length in zip(low, edges, begin, data.shape[1:], strict=True)
    ]
    # the crop seen along the source's axes
    turned = crop.permute(0, *(1 + axis for axis in axes))
    mirrored = [sum(row) < 0 for row in box.matrix.tolist()]
    source = data[(slice(None), *map(slice, begin, end))]
    if list(source.shape[1:]) == edges:
        _mirror_into(turned, source, mirrored)
        return None
    # in a mirrored axis the crop's first voxel is the source's last
    places = [
        slice(first + edge - stop, first + edge - start) if mirror else slice(start - first, stop - first)
        for first, edge, start, stop, mirror in zip(low, edges, begin, end, mirrored, strict=True)
    ]
    target = (slice(None), *places)
    crop.zero_()
    _mirror_into(turned[target], source, mirrored)
    inside = torch.zeros((1, *size), dtype=torch.bool, device=data.device)
    inside.permute(0, *(1 + axis for axis in axes))[target] = True
    return inside


def _mirror_into(target: Tensor, source: Tensor, mirrored: list[bool]) -> None:
    """Copy (C, d, h, w) with some axes mirrored; on the CPU a few planes at a time, which stay in a cache between.

    numpy copies mirrored axes in one pass, which takes up to four times as long where the last alone is mirrored.
    """
    axes = [1 + axis for axis, mirror in enumerate(mirrored) if mirror]
    if not axes:
        target.copy_(source)
        return
    depth = source.shape[1]
    planes = max(1, MIRRORED // max(1, source[:, :1].numel())) if target.device.type == "cpu" else max(1, depth)
    for begin in range(0, depth, planes):
        stop = min(begin + planes, depth)
        part = source[:, depth - stop : depth - begin] if mirrored[0] else source[:, begin:stop]
        target[:, begin:stop] = part.flip(axes)


def _resample(data: Tensor, box: SourceBox, size: Sequence[int], crop: Tensor) -> Tensor | None:
    # grid_sample's coordinates (align_corners=False): voxel x of n lies at (2 x + 1) / n - 1, axes in reverse order;
    # each coordinate is a sum of three lines, so the whole grid is one addition of a plane and a line
    edges = np.asarray(data.shape[1:], dtype=float)
    grid = _line((2 * box.center + 1) / edges - 1, (3, 1, 1, 1), data.device)
    for axis, length in enumerate(size):
        place = (np.arange(length) - (length - 1) / 2) * (2 * box.matrix[:, axis] / edges)[:, None]  # (3, length)
        grid = grid + _line(place, [3, *(length if a == axis else 1 for a in range(3))], data.device)
    crop.copy_(F.grid_sample(data[None], grid.permute(1, 2, 3, 0)[None], padding_mode="border", align_corners=False)[0])
    half = half_extent(box.matrix, size)
    if (box.center - half >= -0.5).all() and (box.center + half <= edges - 0.5).all():
        return None
    inside = (grid.abs() <= 1).all(0, keepdim=True)  # (1, D, H, W)
    crop.mul_(inside)
    return inside


def _line(values: np.ndarray, shape: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(values[::-1].copy()), device, torch.float32).view(*shape)


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
