"""Views that mix neighbouring voxels: blur, sharpening, low resolution, Gibbs ringing; and the histogram shift.

Batches are (B, C, D, H, W), on the device they are on. A strength is (B, C) on the CPU, and its neutral value leaves a
channel untouched. Every function works in place on its batch and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_ext.views.cpu.coarse import coarse_matrix, lower
from nnssl_ext.views.cpu.separable import along_axes
from nnssl_ext.views.intensity import changed
from nnssl_ext.views.random import to_device

#: A Gaussian is cut off after this many standard deviations.
TRUNCATE = 3.0


def blur(batch: Tensor, deviation: Tensor, spacing: Sequence[float]) -> Tensor:
    """Gaussian blur; ``deviation`` (B, C) in units of the finest voxel edge, 0 = none."""
    for volume, value in changed(batch, deviation, 0.0):
        along_axes(volume, _gaussian(volume.shape, value, spacing), out=volume)
    return batch


def sharpen(batch: Tensor, amount: Tensor, spacing: Sequence[float], deviation: float = 1.0) -> Tensor:
    """Unsharp masking: add ``amount`` (B, C) times the difference to a blurred copy; 0 = none."""
    for volume, value in changed(batch, amount, 0.0):
        blurred = along_axes(volume, _gaussian(volume.shape, deviation, spacing))
        volume.add_(volume.sub(blurred), alpha=value)
    return batch


def lower_resolution(batch: Tensor, zoom: Tensor, spacing: Sequence[float]) -> Tensor:
    """Sample down to ``zoom`` (B, C) of the resolution and back up, trilinearly; 1 = none.

    An axis whose voxels are thicker already keeps its resolution as far as the finest axis' new voxels are finer.
    """
    finest = min(spacing)
    for volume, factor in changed(batch, zoom, 1.0):
        thick = [finest / factor / edge for edge in spacing]
        size = [max(1, round(n / max(1.0, t))) for n, t in zip(volume.shape, thick, strict=True)]
        _coarsen(volume, size)
    return batch


def simulate_thick_slices(batch: Tensor, axis: Tensor, zoom: Tensor) -> Tensor:
    """Sample one axis of each sample down to ``zoom`` (B,) of its resolution and back up; 1 = none; ``axis`` (B,)."""
    for sample in torch.nonzero(zoom != 1).flatten().tolist():
        size, thick = list(batch.shape[2:]), int(axis[sample])
        size[thick] = max(1, round(size[thick] * float(zoom[sample])))
        for volume in batch[sample]:
            _coarsen(volume, size)
    return batch


def gibbs_ringing(batch: Tensor, cut: Tensor) -> Tensor:
    """Gibbs ringing: drop the spatial frequencies outside an ellipsoid of ``cut`` (B, C) times Nyquist; 0 = none."""
    for volume, radius in changed(batch, cut, 0.0):
        frequencies = [torch.fft.fftfreq(n, device=batch.device) * 2 for n in volume.shape[:2]]
        frequencies.append(torch.fft.rfftfreq(volume.shape[2], device=batch.device) * 2)
        depth, height, width = torch.meshgrid(*frequencies, indexing="ij")
        kept = depth**2 + height**2 + width**2 <= radius**2
        volume.copy_(torch.fft.irfftn(torch.fft.rfftn(volume) * kept, s=volume.shape))
    return batch


def shift_histogram(batch: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Bend intensities along a monotone piecewise linear curve.

    Args:
        batch: (B, C, D, H, W).
        values: (B, C, P) of the curve at P equidistant points of the channel's range, as shares of the range; sorted
            here, and its ends are those of the range.
        chosen: (B, C) bool, which channels are bent.
    """
    points = values.shape[-1]
    for sample, channel in torch.nonzero(chosen).tolist():
        volume = batch[sample, channel]
        low, width = volume.min(), (volume.max() - volume.min()).clamp_min(1e-6)
        curve = to_device(values[sample, channel].sort().values, batch.device)
        curve[0], curve[-1] = 0.0, 1.0
        place = ((volume - low) / width).clamp(0, 1) * (points - 1)
        below = place.floor().clamp_max(points - 2)
        bent = torch.lerp(curve[below.long()], curve[below.long() + 1], place - below)
        batch[sample, channel] = bent * width + low
    return batch


def _gaussian(shape: Sequence[int], deviation: float, spacing: Sequence[float]) -> list[Tensor | None]:
    """A matrix for each axis; edges replicated; ``deviation`` in units of the finest voxel edge."""
    kernels: dict[tuple[int, float], Tensor | None] = {}
    places = [(n, deviation * min(spacing) / edge) for n, edge in zip(shape, spacing, strict=True)]
    for place in places:
        if place not in kernels:
            kernels[place] = _kernel(*place)
    return [kernels[place] for place in places]


def _kernel(length: int, sigma: float) -> Tensor | None:
    """A Gaussian along an axis as a matrix (length, length); None where it would change nothing."""
    radius = min(max(1, round(TRUNCATE * sigma)), length - 1)
    if radius < 1:
        return None
    place = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (place / sigma) ** 2)
    column = (torch.arange(length)[:, None] + place).clamp(0, length - 1)
    return torch.zeros(length, length).scatter_add_(1, column, (weight / weight.sum()).expand(length, -1))


def _coarsen(volume: Tensor, size: Sequence[int]) -> None:
    """Sample ``volume`` (D, H, W) down to ``size`` and back up, in place."""
    if volume.device.type == "cpu":
        lower(volume, size)
        return
    pairs = zip(size, volume.shape, strict=True)
    along_axes(volume, [None if m == n else coarse_matrix(m, n) for m, n in pairs], out=volume)
