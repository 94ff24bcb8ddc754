"""Change the intensities of single voxels.

N volumes, D H W voxels. Functions take volumes (N, D, H, W) and one strength for each (N,), both on one device. They
work in place and return the volumes. These are the definitions on every device. ``views.cpu.kernels`` has faster
equivalents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_ext.views.random import to_device

#: Intensity differences below this are rounding, not signal.
EPSILON = 1e-6


def add_noise(volumes: Tensor, deviation: Tensor, seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise. Neighbors with equal ``seeds`` (N,) share one generator."""
    noise, begin = torch.empty_like(volumes), 0
    while begin < len(seeds):
        end = begin + 1
        while end < len(seeds) and seeds[end] == seeds[begin]:
            end += 1
        noise[begin:end].normal_(generator=torch.Generator(volumes.device).manual_seed(seeds[begin]))
        begin = end
    return volumes.addcmul_(noise, _column(deviation))


def scale_brightness(volumes: Tensor, factor: Tensor) -> Tensor:
    """Multiply intensities by ``factor`` (N,)."""
    return volumes.mul_(_column(factor))


def scale_contrast(volumes: Tensor, factor: Tensor) -> Tensor:
    """Stretch intensities about their mean, within their range. By ``factor`` (N,)."""
    low, high = value_range(volumes)
    mean = volumes.mean((1, 2, 3), keepdim=True)
    stretched = torch.addcmul(mean, volumes - mean, _column(factor))
    return torch.clamp(stretched, low, high, out=volumes)


def adjust_gamma(volumes: Tensor, exponent: Tensor, *, invert: bool = False, retain_stats: bool = False) -> Tensor:
    """Raise scaled intensities to a power, and scale back.

    Inverted, the curve applies to the negated intensities, as nnU-Net's first gamma. ``retain_stats`` keeps each
    volume's mean and standard deviation, as nnU-Net does.
    """
    if invert:
        volumes.neg_()
    low, high = value_range(volumes)
    width = (high - low).clamp_min(EPSILON)
    result = ((volumes - low) / width).pow(_column(exponent)) * width + low
    if retain_stats:
        deviation, mean = torch.std_mean(volumes, (1, 2, 3), keepdim=True, correction=0)
        found, center = torch.std_mean(result, (1, 2, 3), keepdim=True, correction=0)
        result = torch.addcmul(mean, result - center, deviation / found.clamp_min(EPSILON))
    return torch.neg(result, out=volumes) if invert else volumes.copy_(result)


def shift_histogram(volumes: Tensor, curve: Tensor) -> Tensor:
    """Map intensities along a monotone piecewise linear curve.

    ``curve`` (N, P) has its values at P equidistant points of the volume's range, as shares of it, from 0 to 1.
    """
    last = curve.shape[1] - 1
    low, high = value_range(volumes)
    width = (high - low).clamp_min(EPSILON)
    place = ((volumes - low) / width * last).flatten(1)
    below = place.long().clamp_(0, last - 1)
    start = curve.gather(1, below)
    mapped = torch.addcmul(start, place - below, curve.gather(1, below + 1) - start)
    return torch.addcmul(low, mapped.view_as(volumes), width, out=volumes)


def invert(volumes: Tensor) -> Tensor:
    """Mirror intensities about the middle of their range."""
    low, high = value_range(volumes)
    return torch.sub(low + high, volumes, out=volumes)


def remap_percentiles(batch: Tensor, low: float = 0.001, high: float = 0.999) -> Tensor:
    """Scale quantiles to 0 and 1, and clip. (B, C, D, H, W). Constant channels become 0."""
    for volume in batch.flatten(0, 1):
        # every k-th voxel is enough for a quantile, and torch.quantile takes 16 million values at most
        step = max(1, volume.numel() // 100_000)
        while math.gcd(step, volume.shape[-1]) > 1:  # it would meet the same columns in each row
            step += 1
        sample = volume.flatten()[::step]
        bottom, top = torch.quantile(sample, to_device(torch.tensor([low, high]), batch.device))
        volume.sub_(bottom).div_((top - bottom).clamp_min(EPSILON)).clamp_(0, 1)
    return batch


def value_range(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each volume's range, (N, 1, 1, 1) each."""
    return volumes.amin((1, 2, 3), keepdim=True), volumes.amax((1, 2, 3), keepdim=True)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
