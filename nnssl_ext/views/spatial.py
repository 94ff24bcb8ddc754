"""Draw and apply mirrors, quarter turns, rotation and zoom.

A draw is a matrix M (3, 3) in voxel coordinates. Voxel o of a crop with edges s comes from the source point
``center + M (o - (s - 1) / 2)``. A worker knows M before it reads a case, so it reads only the box that M reaches. The
device then resamples that box once.

B batch, G boxes, V crops of a box, C channel, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.cpu.chunks import has_kernels
from nnssl_ext.views.cpu.crops import copy_crop, interpolate_crop, is_copy, source_axes
from nnssl_ext.views.random import pack_to_device

#: Above this ratio of spacings crops rotate only in the plane of the thin slices, as in nnU-Net.
ANISOTROPY_LIMIT = 3.0


@dataclass(frozen=True)
class SpatialRange:
    """Describe a spatial view's ranges. All zero is the identity.

    Args:
        spacing: Voxel edges in mm, one per axis. Rotations are in mm.
        flip: Probability of a mirror, per axis.
        rot90: Probability of quarter turns in a plane whose two axes agree in spacing and crop edge.
        affine: Probability of a rotation and zoom.
        rotation: Largest angle about each axis, in degrees.
        zoom: Smallest and largest magnification. A thick axis is not magnified: its slices would be averaged.
    """

    spacing: tuple[float, ...]
    flip: float = 0.0
    rot90: float = 0.0
    affine: float = 0.0
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)

    def draw(self, generator: np.random.Generator, size: Sequence[int], *, resample: bool | None = None) -> np.ndarray:
        """Draw one matrix (3, 3) for a crop.

        Args:
            generator: Source of the draws.
            size: Edges of the crop.
            resample: Take the rotation and zoom, or leave them out. None decides by their chance.
        """
        matrix = np.diag(np.where(generator.random(3) < self.flip, -1.0, 1.0))
        quarter, plane_at, quarters = generator.random(), generator.random(), int(generator.integers(1, 4))
        planes = self._square_planes(size)
        if planes and quarter < self.rot90:
            matrix = matrix @ _quarter_turn(planes[int(plane_at * len(planes))], quarters)
        bend, zoom = generator.random(), generator.uniform(*self.zoom)
        angles = generator.uniform(-self.rotation, self.rotation, 3)
        if (bend < self.affine if resample is None else resample) and (self.rotation or self.zoom != (1.0, 1.0)):
            turning = self.turning_axes()
            matrix = rotation_matrix(np.where(turning, angles, 0.0), self.spacing) @ matrix
            matrix /= np.where(turning.all() | ~turning, zoom, 1.0)[:, None]
        return matrix

    def _square_planes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        return [
            (a, b)
            for a, b in ((0, 1), (0, 2), (1, 2))
            if size[a] == size[b] and abs(self.spacing[a] / self.spacing[b] - 1) < 0.01
        ]

    def turning_axes(self) -> np.ndarray:
        """Return axes of rotation by any angle: (3,) bool."""
        spacing = np.asarray(self.spacing)
        if spacing.max() / spacing.min() < ANISOTROPY_LIMIT:
            return np.ones(3, bool)
        return spacing == spacing.max()


@dataclass
class SourceBox:
    """Hold a box of a case, and a crop's place.

    Attributes:
        data: (C, d, h, w), the box clipped to the volume.
        matrix: (3, 3), from voxels of the crop to voxels of the box.
        center: The crop's center in voxels of ``data``. It may lie outside.
        case: The case's identifier.
    """

    data: Tensor
    matrix: np.ndarray
    center: np.ndarray
    case: str = ""

    def pin_memory(self) -> SourceBox:
        return SourceBox(self.data.pin_memory(), self.matrix, self.center, self.case)


def half_extent(matrix: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return half the edges (3,) of a crop's source region."""
    return np.abs(matrix) @ ((np.asarray(size) - 1) / 2)


def shrink_to_fit(matrix: np.ndarray, size: Sequence[int], room: np.ndarray, *, isotropic: bool = True) -> np.ndarray:
    """Shrink a crop's matrix to fit ``room``.

    Where a source has one plane, an extended crop repeats it.

    Args:
        matrix: (3, 3).
        size: Edges of the crop.
        room: (3,) half extents that are allowed, along the axes of the source.
        isotropic: Shrink all axes alike, or each axis of the source that is too short by itself.
    """
    half = half_extent(matrix, size)
    extended = half > 1e-9
    shrink = np.divide(room, half, out=np.ones(3), where=extended).clip(max=1.0)
    plane = extended & (room <= 0)
    if isotropic and not plane.all():
        shrink = np.where(plane, 0.0, shrink[~plane].min())
    return matrix * shrink[:, None]


def subview(
    box: SourceBox,
    size: Sequence[int],
    view: np.ndarray,
    place: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
    *,
    view_size: Sequence[int] | None = None,
    isotropic: bool = True,
) -> SourceBox:
    """Place a view so that it needs no padding.

    Args:
        box: The crop's box.
        size: Edges of the crop, in voxels.
        view: (3, 3), from voxels of the view to voxels of the crop. It is shrunk where it would leave the crop.
        place: Position within the room that is left, in [-1, 1] per axis; 0 is the middle.
        view_size: Edges of the view; None for those of the crop.
        isotropic: Shrink all axes alike, or each axis that is too short by itself.
    """
    edges = size if view_size is None else view_size
    room = half_extent(box.matrix, size)
    matrix = shrink_to_fit(box.matrix @ view, edges, room, isotropic=isotropic)
    left = np.maximum(room - half_extent(matrix, edges), 0)
    return SourceBox(box.data, matrix, box.center + np.asarray(place) * left, box.case)


def on_voxels(box: SourceBox, size: Sequence[int]) -> SourceBox:
    """Move a crop of the voxels themselves onto them, by up to half a voxel. Others stay."""
    if not np.array_equal(box.matrix, np.eye(3)):
        return box
    half = (np.asarray(size) - 1) / 2
    return replace(box, center=np.floor(box.center - half + 0.5) + half)


def source_range(center: np.ndarray, half: np.ndarray, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last + 1 voxel (3,) that a crop reads. Within the volume."""
    low = np.clip(np.floor(center - half + 1e-6), 0, volume - 1).astype(int)
    return low, np.clip(np.ceil(center + half - 1e-6) + 1, low + 1, volume).astype(int)


def is_constant(box: SourceBox, size: Sequence[int]) -> bool:
    """Return whether every channel of the source region is constant."""
    low, high = source_range(box.center, half_extent(box.matrix, size), np.asarray(box.data.shape[1:]))
    region = box.data[(slice(None), *map(slice, low.tolist(), high.tolist()))]
    # two voxels nearly always decide it
    if not torch.equal(region[:, 0, 0, 0], region[:, -1, -1, -1]):
        return False
    return torch.equal(region.amin((1, 2, 3)), region.amax((1, 2, 3)))


def is_resampled(matrix: np.ndarray) -> bool:
    """Return whether a crop interpolates voxels."""
    return source_axes(matrix) is None or bool((np.abs(matrix).sum(0) != 1).any())


def rotation_matrix(angles: Sequence[float] | np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return a rotation's matrix (3, 3) in voxels.

    It rotates in mm by ``angles`` (3,) in degrees about the three axes.
    """
    edges = np.asarray(spacing)
    return _rotation(np.deg2rad(angles)) * edges[None, :] / edges[:, None]


def crop_box(box: SourceBox, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Cut one crop: (C, D, H, W) and ``inside`` (1, D, H, W)."""
    crops, inside = crop_batch([box], size, device)
    return crops[0], None if inside is None else inside[0]


def crop_batch(
    boxes: Sequence[SourceBox], size: Sequence[int], device: torch.device, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cut one crop out of each box, trilinearly.

    On a GPU all crops are one resampling. Data that boxes share are sent there once.

    Args:
        boxes: B.
        size: Edges of the crops.
        device: Of the crops.
        out: Where the crops are written, (B, C, D, H, W); None for a new tensor.

    Returns:
        Crops (B, C, D, H, W) float32, zero outside the volume (nnU-Net's padding). ``inside`` (B, 1, D, H, W) bool, or
        None where no voxel lies outside.
    """
    if device.type != "cpu":
        crops, inside = resample_batch(boxes, size, device)
        return (crops if out is None else out.copy_(crops)), inside
    crops = torch.empty((len(boxes), len(boxes[0].data), *size)) if out is None else out
    insides: list[Tensor | None] = []
    for _, group in groupby(zip(boxes, crops, strict=True), key=lambda pair: id(pair[0].data)):
        insides += _crop_on_cpu(*zip(*group, strict=True))
    if all(inside is None for inside in insides):
        return crops, None
    whole = torch.ones((1, 1, 1, 1), dtype=torch.bool).expand(1, *size)
    return crops, torch.stack([whole if inside is None else inside for inside in insides])


def _crop_on_cpu(boxes: Sequence[SourceBox], crops: Sequence[Tensor]) -> list[Tensor | None]:
    """Fill one box's crops and return each ``inside``.

    It takes the fastest way that their matrices allow.
    """
    data, size = boxes[0].data.to(torch.float32), crops[0].shape[1:]
    insides: list[Tensor | None] = [None] * len(boxes)
    left = []
    for n, (box, crop) in enumerate(zip(boxes, crops, strict=True)):
        axes = source_axes(box.matrix)
        if axes is not None and is_copy(box.matrix, box.center, axes, size):
            insides[n] = copy_crop(data, box.matrix, box.center, axes, crop)
        elif axes is not None and has_kernels(crop.device, size):
            insides[n] = interpolate_crop(data, box.matrix, box.center, axes, crop)
        else:
            left.append(n)
    # many small crops are one resampling; a large one has the memory of a grid for itself
    runs = [[n] for n in left] if has_kernels(crops[0].device, size) else [left] if left else []
    for run in runs:
        found, inside = resample_batch([replace(boxes[n], data=data) for n in run], size, data.device)
        for n, crop, within in zip(run, found, [None] * len(run) if inside is None else inside, strict=True):
            crops[n].copy_(crop)
            insides[n] = within
    return insides


def resample_batch(
    boxes: Sequence[SourceBox], size: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Resample all crops at once: ``crop_batch``'s definition."""
    groups, views = _grouped(boxes)
    non_blocking = device.type == "cuda"  # as in ``to_device``
    shapes = np.array([group.data.shape[1:] for group in groups])
    padded = shapes.max(0)
    sent_once = {id(group.data): group for group in groups}
    data = torch.zeros((len(sent_once), len(groups[0].data), *padded), device=device)
    for target, group in zip(data, sent_once.values(), strict=True):
        depth, height, width = group.data.shape[1:]
        # of another type, torch would convert on the host, into memory that is not pinned
        source = group.data if group.data.dtype == data.dtype else group.data.to(device, non_blocking=non_blocking)
        target[:, :depth, :height, :width].copy_(source, non_blocking=non_blocking)
    if len(sent_once) < len(groups):
        rows = dict(zip(sent_once, data, strict=True))
        data = torch.stack([rows[id(group.data)] for group in groups])
    shape = (len(groups), views, 3)
    matrix = np.stack([box.matrix for box in boxes])[:, ::-1].reshape(*shape, 3)  # grid_sample reverses the axes
    center = np.stack([box.center for box in boxes])[:, ::-1].reshape(shape)
    # the place of each crop's voxel in its box: a sum of three lines
    lines = [(np.arange(n) - (n - 1) / 2)[:, None] * matrix[:, :, None, :, axis] for axis, n in enumerate(size)]
    lines[0] += center[:, :, None]  # (G, V, D, 3)
    # grid_sample's coordinates (align_corners=False): voxel x of n lies at (2 x + 1) / n - 1
    scale = 2 / padded[::-1]
    parameters = [*lines, shapes[:, ::-1] - 1, scale, scale / 2 - 1]
    sent = pack_to_device([torch.from_numpy(array.astype(np.float32)) for array in parameters], device)
    place = sent[0][:, :, :, None, None] + sent[1][:, :, None, :, None] + sent[2][:, :, None, None]
    last, inside = sent[3].view(-1, 1, 1, 1, 1, 3), None
    if any(_leaves(box, size) for box in boxes):
        inside = ((place >= -0.5) & (place <= last + 0.5)).all(-1).flatten(0, 1)[:, None]
    if (shapes < padded).any():  # the border that grid_sample repeats is that of the largest box
        place = torch.minimum(place, last)
    grid = torch.addcmul(sent[5], place, sent[4])
    found = F.grid_sample(data, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    crops = found.unflatten(2, (views, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    return (crops, None) if inside is None else (crops.mul_(inside), inside)


def _grouped(boxes: Sequence[SourceBox]) -> tuple[list[SourceBox], int]:
    """Return one box per group that shares data, and its length. The length is 1 if groups differ."""
    starts = [n for n, box in enumerate(boxes) if n == 0 or box.data is not boxes[n - 1].data]
    views = len(boxes) // len(starts)
    if starts != list(range(0, len(boxes), views)):
        return list(boxes), 1
    return [boxes[start] for start in starts], views


def _leaves(box: SourceBox, size: Sequence[int]) -> bool:
    """Return whether a crop leaves its box."""
    half = half_extent(box.matrix, size)
    return bool((box.center - half < -0.5).any() or (box.center + half > np.asarray(box.data.shape[1:]) - 0.5).any())


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
