"""Pieces of a batch that fit in a CPU core's cache, so that several operations in a row read main memory once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Voxels of a piece, about: a few arrays of them lie in a core's cache together.
VOXELS = 1 << 16


def slabs(batch: Tensor) -> Iterator[tuple[slice, ...]]:
    """Indices of pieces of a batch (B, C, D, H, W): planes of one sample on the CPU, the whole batch on a GPU."""
    if batch.device.type != "cpu":
        yield (slice(None),) * 5
        return
    samples, channels, depth, height, width = batch.shape
    planes = max(1, VOXELS // max(1, channels * height * width))
    for sample in range(samples):
        for begin in range(0, depth, planes):
            yield slice(sample, sample + 1), slice(None), slice(begin, begin + planes), slice(None), slice(None)
