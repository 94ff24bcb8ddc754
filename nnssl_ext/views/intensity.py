"""Views that change each voxel by itself: noise, brightness, contrast, gamma, inversion, percentiles.

Batches are (B, C, D, H, W), on the device they are on. A strength is a (B, C) tensor on the CPU whose neutral value
leaves a channel as it is; a channel with the neutral value is not touched at all. Every function works in place on its
batch and returns it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.cpu.chunks import flat_chunks
from nnssl_ext.views.random import BatchRandom, to_device

#: Intensity differences below this are rounding, not signal.
EPSILON = 1e-6


def add_noise(batch: Tensor, deviation: Tensor, random: BatchRandom) -> Tensor:
    """Add Gaussian noise; ``deviation`` (B,)."""
    for sample, value in enumerate(deviation.tolist()):
        if value:
            generator = random.noise(sample)
            for piece in flat_chunks(batch[sample]):
                piece.add_(torch.empty_like(piece).normal_(generator=generator), alpha=value)
    return batch


def scale_brightness(batch: Tensor, factor: Tensor) -> Tensor:
    """Multiply intensities; ``factor`` (B, C)."""
    for volume, value in changed(batch, factor, 1.0):
        volume *= value
    return batch


def stretch_contrast(batch: Tensor, factor: Tensor) -> Tensor:
    """Stretch intensities about their mean, kept within the range they had; ``factor`` (B, C)."""
    for volume, value in changed(batch, factor, 1.0):
        low, high = torch.aminmax(volume)
        shift = volume.mean() * (1 - value)
        for piece in flat_chunks(volume):
            torch.add(shift, piece, alpha=value, out=piece)
            torch.minimum(torch.maximum(piece, low, out=piece), high, out=piece)
    return batch


def adjust_gamma(batch: Tensor, exponent: Tensor) -> Tensor:
    """Raise intensities, scaled to [0, 1], to a power, and scale them back; ``exponent`` (B, C)."""
    for volume, value in changed(batch, exponent, 1.0):
        low, high = torch.aminmax(volume)
        # width ((x - low) / width)^value through logarithms, which is faster than a power by far; log 0 is -inf
        scale = (high - low).clamp_min(EPSILON).log2() * (1 - value)
        for piece in flat_chunks(volume):
            torch.add(scale, _log2(piece.sub_(low)), alpha=value, out=piece).exp2_().add_(low)
    return batch


def _log2(values: Tensor) -> Tensor:
    """In place; on a CPU with AVX-512 numpy's, which takes a quarter of the time of torch's."""
    if values.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return values.log2_()
    array = values.numpy()
    with np.errstate(divide="ignore"):
        np.log2(array, out=array)
    return values


def invert(batch: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the intensities of chosen samples about the middle of their range; ``chosen`` (B,) bool."""
    for sample in [sample for sample, wanted in enumerate(chosen.tolist()) if wanted]:
        low, high = batch[sample].amin((1, 2, 3), True), batch[sample].amax((1, 2, 3), True)
        batch[sample] = low + high - batch[sample]
    return batch


def remap_percentiles(batch: Tensor, low: float = 0.001, high: float = 0.999) -> Tensor:
    """Scale each channel so that its ``low`` and ``high`` quantiles become 0 and 1, clipped; constant gives 0."""
    for volume in batch.flatten(0, 1):
        # every k-th voxel is enough for a quantile, and torch.quantile takes 16 million values at most
        sample = volume.flatten()[:: max(1, volume.numel() // 100_000)]
        bottom, top = torch.quantile(sample, to_device(torch.tensor([low, high]), batch.device))
        volume.sub_(bottom).div_((top - bottom).clamp_min(EPSILON)).clamp_(0, 1)
    return batch


def changed(batch: Tensor, values: Tensor, neutral: float) -> Iterator[tuple[Tensor, float]]:
    """Each channel (D, H, W) of ``batch`` whose value in ``values`` (B, C) is not neutral, and the value."""
    for sample, row in enumerate(values.tolist()):
        for channel, value in enumerate(row):
            if value != neutral:
                yield batch[sample, channel], value
