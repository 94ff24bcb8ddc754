"""Split batches into chunks for a core's cache.

Several operations in a row then read main memory once. On other devices a chunk is everything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Voxels of a chunk. A few arrays of them fit in a core's own cache.
VOXELS = 1 << 16
#: Up to this many voxels of a volume its definition, for all volumes at once, is faster than a kernel for each.
SMALL = 1 << 13
#: Voxels of the samples that pass through several views one after the other.
SAMPLES = 1 << 20


def voxel_chunks(batch: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and voxels of a flattened batch (B, C, V)."""
    if batch.device.type != "cpu":
        yield slice(None), slice(None)
        return
    samples, channels, voxels = batch.shape
    step = max(1, VOXELS // channels)
    for sample in range(samples):
        for begin in range(0, voxels, step):
            yield slice(sample, sample + 1), slice(begin, min(begin + step, voxels))


def sample_chunks(batch: Tensor) -> list[slice]:
    """Return slices of samples that fit the last cache."""
    samples = len(batch)
    step = max(1, SAMPLES // max(1, batch[0].numel())) if batch.device.type == "cpu" else samples
    return [slice(begin, min(begin + step, samples)) for begin in range(0, samples, step)]


def flat_chunks(volume: Tensor) -> Iterator[Tensor]:
    """Yield flat views of a contiguous volume on the CPU."""
    return iter(volume.view(-1).split(VOXELS))


def has_kernels(device: torch.device, size: Sequence[int]) -> bool:
    """Return whether kernels are faster than definitions here."""
    return device.type == "cpu" and torch.Size(size).numel() > SMALL


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_MEMORY = _Memory()


def scratch(shape: Sequence[int], device: torch.device, name: str = "") -> Tensor:
    """Return a float32 tensor with arbitrary content.

    It is valid until the next call with this name in this thread.

    On the CPU it is the same memory each time. The system fills new memory with zeros, which takes longer than a copy.
    """
    if device.type != "cpu":
        return torch.empty(*shape, device=device)
    number = torch.Size(shape).numel()
    buffer = _MEMORY.buffers.get(name)
    if buffer is None or len(buffer) < number:
        buffer = _MEMORY.buffers[name] = torch.empty(number)
    return buffer[:number].view(*shape)
