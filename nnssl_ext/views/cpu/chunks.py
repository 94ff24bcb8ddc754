"""Pieces of a batch that fit in a CPU core's cache, so that several operations in a row read main memory once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Voxels of a piece, about: a few arrays of them lie in a core's cache together.
VOXELS = 1 << 16
#: Voxels of the samples that several views pass through one after the other.
SAMPLES = 1 << 20


def voxel_chunks(batch: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which samples and voxels of a flattened batch (B, C, V) to take at a time: all of them on a GPU."""
    if batch.device.type != "cpu":
        yield slice(None), slice(None)
        return
    samples, channels, voxels = batch.shape
    together = max(1, VOXELS // channels)
    for sample in range(samples):
        for begin in range(0, voxels, together):
            yield slice(sample, sample + 1), slice(begin, min(begin + together, voxels))


def sample_chunks(batch: Tensor) -> list[slice]:
    """Samples of a batch (B, ...) to take at a time: as many as a CPU's last cache holds; all of them on a GPU."""
    samples = len(batch)
    at_once = max(1, SAMPLES // max(1, batch[0].numel())) if batch.device.type == "cpu" else samples
    return [slice(begin, min(begin + at_once, samples)) for begin in range(0, samples, at_once)]


def flat_chunks(volume: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous volume, one after the other; all of it on a GPU."""
    flat = volume.view(-1)
    return iter(flat.split(VOXELS)) if volume.device.type == "cpu" else iter((flat,))


class _Memory(threading.local):
    buffer: Tensor | None = None


_MEMORY = _Memory()


def scratch(shape: Sequence[int], device: torch.device) -> Tensor:
    """A float32 tensor with arbitrary content, valid until the next call in this thread.

    On the CPU it is the same memory each time: the system fills new memory with zeros, which takes longer than a copy.
    """
    if device.type != "cpu":
        return torch.empty(*shape, device=device)
    number = torch.Size(shape).numel()
    if _MEMORY.buffer is None or len(_MEMORY.buffer) < number:
        _MEMORY.buffer = torch.empty(number)
    return _MEMORY.buffer[:number].view(*shape)
