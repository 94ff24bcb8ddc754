"""Mix neighboring voxels: blur, resolution, slices and ringing.

N volumes, D H W voxels. Functions take volumes (N, D, H, W) and strengths on the same device. They work in place and
return the volumes. These are the definitions on every device. ``views.cpu.kernels`` has faster equivalents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.random import pack_to_device, to_device

#: A Gaussian is cut off after this many standard deviations, less a quarter of a voxel, as in nnU-Net.
TRUNCATE = 3.0
#: The smallest standard deviation of a Gaussian, in voxels. It changes nothing.
MIN_DEVIATION = 1e-3


def blur(volumes: Tensor, deviation: Tensor, spacing: Sequence[float]) -> Tensor:
    """Blur with a Gaussian. Edges are replicated.

    Args:
        volumes: (N, D, H, W).
        deviation: (N, 3) standard deviation along each axis, in edges of the finest voxel axis.
        spacing: Voxel edges in mm.
    """
    number, depth, height, width = volumes.shape
    ratios = torch.tensor([min(spacing) / edge for edge in spacing])
    scaled, edges = deviation * to_device(ratios, deviation.device), (depth, height, width)
    if depth == height == width:
        along_depth, along_height, along_width = gaussian_matrices(scaled.T.flatten(), depth).chunk(3)
    else:
        along_depth, along_height, along_width = map(gaussian_matrices, scaled.unbind(1), edges)
    result = torch.bmm(volumes.reshape(number, -1, width), along_width.transpose(1, 2)).view(volumes.shape)
    result = torch.matmul(along_height[:, None], result)
    return volumes.copy_(torch.bmm(along_depth, result.flatten(2)).view(volumes.shape))


def sharpen(volumes: Tensor, amount: Tensor, spacing: Sequence[float], deviation: float = 1.0) -> Tensor:
    """Add ``amount`` (N,) times the unsharp mask."""
    blurred = blur(volumes.clone(), amount.new_full((len(volumes), 3), deviation), spacing)
    return volumes.addcmul_(volumes - blurred, amount.view(-1, 1, 1, 1))


def lower_resolution(volumes: Tensor, zoom: Tensor, spacing: Sequence[float]) -> Tensor:
    """Sample down to a share and back up, trilinearly.

    The share ``zoom`` (N,) is on the CPU. An axis whose voxels are thicker already keeps its resolution while it is
    coarser than the new finest axis.
    """
    return _resample_axes(volumes, [coarse_size(volumes.shape[1:], share, spacing) for share in zoom.tolist()])


def simulate_thick_slices(batch: Tensor, axis: Tensor, zoom: Tensor) -> Tensor:
    """Sample one axis of (B, C, D, H, W) down and back up.

    ``axis`` and the share ``zoom`` are (B,), on the CPU. A share of 1 changes nothing.
    """
    for sample in torch.nonzero(zoom != 1).flatten().tolist():
        size, thick = list(batch.shape[2:]), int(axis[sample])
        size[thick] = max(1, round(size[thick] * float(zoom[sample])))
        _resample_axes(batch[sample], [size] * batch.shape[1])
    return batch


def gibbs_ringing(volumes: Tensor, cutoff: Tensor) -> Tensor:
    """Drop frequencies outside ``cutoff`` (N,) times Nyquist's. The region is an ellipsoid."""
    shape = volumes.shape[1:]
    frequencies = [torch.fft.fftfreq(n, device=volumes.device) * 2 for n in shape[:2]]
    frequencies.append(torch.fft.rfftfreq(shape[2], device=volumes.device) * 2)
    depth, height, width = torch.meshgrid(*frequencies, indexing="ij")
    kept = (depth**2 + height**2 + width**2) <= cutoff.view(-1, 1, 1, 1) ** 2
    return volumes.copy_(torch.fft.irfftn(torch.fft.rfftn(volumes, dim=(1, 2, 3)) * kept, s=shape, dim=(1, 2, 3)))


def gaussian_taps(deviation: float, length: int) -> list[float]:
    """Return a Gaussian's weights at distances 0, 1, ... The axis has ``length`` voxels."""
    deviation = max(deviation, MIN_DEVIATION)
    radius = min(max(1, round(TRUNCATE * deviation - 0.25)), length - 1)
    weights = [1.0] + [math.exp(-0.5 * (k / deviation) ** 2) for k in range(1, radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def gaussian_matrices(deviation: Tensor, length: int) -> Tensor:
    """Return Gaussian filters as matrices: (N,) -> (N, length, length). Edges are replicated."""
    if length == 1:
        return deviation.new_ones(len(deviation), 1, 1)
    sigma = deviation.clamp_min(MIN_DEVIATION)[:, None, None]
    radius = (TRUNCATE * sigma - 0.25).round().clamp(1, length - 1)
    place = torch.arange(length, device=deviation.device)
    # a column for each voxel from one length before the axis to one after it; those outside count for the edge
    distance = (torch.arange(-length + 1, 2 * length - 1, device=deviation.device) - place[:, None]).abs()
    weight = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= radius)
    weight = weight / weight.sum(-1, keepdim=True)
    result = weight[..., length - 1 : 2 * length - 1].clone()
    result[..., 0] += weight[..., : length - 1].sum(-1)
    result[..., -1] += weight[..., 2 * length - 1 :].sum(-1)
    return result


class Taps(NamedTuple):
    """Linear interpolation along one axis.

    Attributes:
        below, above: (new length,) int64, the two voxels that each new one lies between.
        share: (new length,) float32 weight of the one above.
    """

    below: Tensor
    above: Tensor
    share: Tensor


@lru_cache(maxsize=256)
def coarse_taps(small: int, length: int) -> Taps:
    """Sample ``small`` of ``length`` voxels and interpolate back. It follows torch's conventions."""
    nearest = F.interpolate(torch.arange(length)[None, None].double(), size=small, mode="nearest-exact")[0, 0].long()
    place = ((torch.arange(length) + 0.5) * (small / length) - 0.5).clamp(0, small - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(small - 1)
    return Taps(nearest[below], nearest[above], (place - below).float())


def coarse_size(shape: Sequence[int], zoom: float, spacing: Sequence[float]) -> list[int]:
    """Return a coarser grid's edges. It has ``zoom`` times the resolution of the finest axis."""
    thickness = [min(spacing) / zoom / edge for edge in spacing]
    return [max(1, round(n / max(1.0, t))) for n, t in zip(shape, thickness, strict=True)]


def _resample_axes(volumes: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Sample each volume down and back up, in place."""
    result = volumes
    for axis in range(3):
        length = volumes.shape[1 + axis]
        if all(size[axis] == length for size in sizes):
            continue
        taps = [coarse_taps(size[axis], length) for size in sizes]
        shape = [len(sizes), *(length if a == axis else 1 for a in range(3))]
        columns = [torch.stack(column) for column in zip(*taps, strict=True)]
        below, above, share = (column.view(shape) for column in pack_to_device(columns, volumes.device))
        first, second = (torch.take_along_dim(result, place, 1 + axis) for place in (below, above))
        result = torch.lerp(first, second, share)
    return volumes.copy_(result)
