"""Augment one volume on the CPU, faster than the definitions.

A volume is contiguous, (D, H, W) float32, and is changed in place. Operations run over chunks that stay in the core's
cache. The definitions are in ``views.intensity`` and ``views.filters``, and the tests hold these functions to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.cpu.chunks import VOXELS, flat_chunks, scratch
from nnssl_ext.views.cpu.linear import interpolate
from nnssl_ext.views.filters import coarse_size, coarse_taps, gaussian_taps
from nnssl_ext.views.intensity import EPSILON

CPU = torch.device("cpu")
#: Levels of the noise: quantiles of the normal distribution at equidistant probabilities.
LEVELS = 1 << 16
#: Voxels that a filter passes through at a time.
FILTERED = 2 * VOXELS


def add_noise(volume: Tensor, deviation: float, seed: Sequence[int]) -> None:
    """Add quantized Gaussian noise. It has 65,536 equally likely levels, at most 4.3 standard deviations."""
    bits = np.random.SFC64(seed)
    for chunk in flat_chunks(volume):
        chunk.add_(quantized_normal(bits, len(chunk)), alpha=deviation)


def quantized_normal(bits: np.random.SFC64, number: int) -> Tensor:
    """Draw standard normal noise with 65,536 equally likely levels, at most 4.3: (number,) float32."""
    places = bits.random_raw(-(-number // 4)).view(np.uint16)[:number]
    return _levels().index_select(0, torch.from_numpy(places.astype(np.int32)))


@lru_cache(maxsize=1)
def _levels() -> Tensor:
    probability = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = torch.special.ndtri(probability)
    return (levels / levels.square().mean().sqrt()).float()


def scale_contrast(volume: Tensor, factor: float) -> None:
    """Stretch intensities about their mean, within their range."""
    low, high = torch.aminmax(volume)
    shift = volume.mean() * (1 - factor)
    for chunk in flat_chunks(volume):
        torch.add(shift, chunk, alpha=factor, out=chunk)
        torch.minimum(torch.maximum(chunk, low, out=chunk), high, out=chunk)


def adjust_gamma(volume: Tensor, exponent: float, *, invert: bool, retain_stats: bool) -> None:
    """Raise scaled intensities to a power, and scale back."""
    lowest, highest = (float(value) for value in torch.aminmax(volume))
    low, sign = (-highest, -1.0) if invert else (lowest, 1.0)
    width = max(highest - lowest, EPSILON)
    # with y = x - low, both sums are of small numbers: x^2 would drown a small deviation in a large mean
    before, after = np.zeros(2), np.zeros(2)
    scale = torch.tensor(math.log2(width) * (1 - exponent))
    for chunk in flat_chunks(volume):
        # width (y / width)^exponent through logarithms, faster than a power by far; log 0 is -inf
        chunk.sub_(lowest) if not invert else torch.sub(highest, chunk, out=chunk)
        if retain_stats:
            before += _sums(chunk)
        torch.add(scale, _log2(chunk), alpha=exponent, out=chunk).exp2_()
        if retain_stats:
            after += _sums(chunk)
    factor, shift = sign, sign * low
    if retain_stats:
        mean, deviation = _moments(before, volume.numel())
        center, found = _moments(after, volume.numel())
        factor = sign * deviation / max(found, EPSILON)
        shift = sign * (mean + low) - factor * center
    offset = torch.tensor(shift)
    for chunk in flat_chunks(volume):
        torch.add(offset, chunk, alpha=factor, out=chunk)


def _sums(values: Tensor) -> np.ndarray:
    return np.array([float(values.sum()), float(torch.dot(values, values))])


def _moments(sums: np.ndarray, number: int) -> tuple[float, float]:
    mean = sums[0] / number
    return float(mean), float(np.sqrt(max(sums[1] / number - mean**2, 0.0)))


def _log2(values: Tensor) -> Tensor:
    """Take logarithms in place. With AVX-512 numpy needs a quarter of torch's time."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return values.log2_()
    array = values.numpy()
    with np.errstate(divide="ignore"):
        np.log2(array, out=array)
    return values


def shift_histogram(volume: Tensor, curve: Sequence[float]) -> None:
    """Map intensities along a monotone, piecewise linear curve."""
    low, high = (float(value) for value in torch.aminmax(volume))
    width, last = max(high - low, EPSILON), len(curve) - 1
    slopes = np.diff(curve) * last
    # the curve is a sum of ramps, one from each point on: max(x, knot) needs no table of segments
    bends = np.diff(slopes, prepend=0.0)
    knots = np.arange(last) / last
    start = curve[0] - float(bends @ knots)
    buffers = scratch((2, min(VOXELS, volume.numel())), CPU, "histogram")
    for chunk in flat_chunks(volume):
        place = chunk.sub_(low).mul_(1 / width)
        ramp, total = buffers[:, : len(chunk)]
        torch.mul(place, float(bends[0]), out=total)
        for bend, knot in zip(bends[1:], knots[1:], strict=True):
            total.add_(torch.clamp(place, min=float(knot), out=ramp), alpha=float(bend))
        torch.add(total.add_(start).mul_(width), low, out=chunk)


def blur(volume: Tensor, deviation: Sequence[float], spacing: Sequence[float], out: Tensor | None = None) -> None:
    """Blur with a Gaussian. Edges are replicated.

    The standard ``deviation`` along each axis is in edges of the finest voxel axis.
    """
    finest = min(spacing)
    taps = [
        gaussian_taps(sigma * finest / edge, length)
        for sigma, edge, length in zip(deviation, spacing, volume.shape, strict=True)
    ]
    depth, height, width = volume.shape
    within, rows = scratch(volume.shape, CPU, "planes"), scratch((FILTERED + height * width,), CPU, "rows")
    planes = max(1, FILTERED // (height * width))
    for begin in range(0, depth, planes):
        source = volume[begin : begin + planes]
        along_width = rows[: source.numel()].view(source.shape)
        _filter(source, along_width, 2, taps[2])
        _filter(along_width, within[begin : begin + planes], 1, taps[1])
    target, step = volume if out is None else out, max(1, FILTERED // (depth * width))
    for begin in range(0, height, step):
        _filter(within[:, begin : begin + step], target[:, begin : begin + step], 0, taps[0])


def _filter(source: Tensor, out: Tensor, axis: int, taps: Sequence[float]) -> None:
    """Filter along an axis with a symmetric kernel. The kernel begins at its center. Edges are replicated."""
    length = source.shape[axis]
    torch.mul(source, taps[0], out=out)
    first, last = source.narrow(axis, 0, 1), source.narrow(axis, length - 1, 1)
    for k, weight in enumerate(taps[1:], 1):
        rest = length - k
        out.narrow(axis, k, rest).add_(source.narrow(axis, 0, rest), alpha=weight)
        out.narrow(axis, 0, rest).add_(source.narrow(axis, k, rest), alpha=weight)
        out.narrow(axis, 0, k).add_(first, alpha=weight)
        out.narrow(axis, rest, k).add_(last, alpha=weight)


def sharpen(volume: Tensor, amount: float, spacing: Sequence[float], deviation: float = 1.0) -> None:
    """Add ``amount`` times the difference to a blurred copy."""
    blurred = scratch(volume.shape, CPU, "blurred")
    blur(volume, (deviation,) * 3, spacing, out=blurred)
    for chunk, soft in zip(flat_chunks(volume), flat_chunks(blurred), strict=True):
        chunk.mul_(1 + amount).add_(soft, alpha=-amount)


def lower_resolution(volume: Tensor, zoom: float, spacing: Sequence[float]) -> None:
    """Sample down to ``zoom`` and back up, trilinearly."""
    sizes = zip(coarse_size(volume.shape, zoom, spacing), volume.shape, strict=True)
    interpolate(volume, [None if small == length else coarse_taps(small, length) for small, length in sizes], volume)
