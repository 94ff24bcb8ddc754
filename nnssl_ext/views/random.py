"""Draw as pure functions of (seed, stream, sample).

B batch. The draws of a sample depend neither on the number of ranks nor on the order of workers or on interruptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

#: Purpose of a stream. Two streams of one sample never share draws.
CASES, CROPS, VIEWS, SUBSTITUTES = 0, 1, 2, 3
#: Validation samples live in streams of their own.
VALIDATION = 16


def sample_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Return one sample's generator in one stream."""
    return np.random.default_rng((seed, stream, index))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the network's seed at one step and rank."""
    return int(np.random.default_rng((seed, 1 << 16, step, *([rank] if rank else []))).integers(1 << 62))


def to_device(draws: Tensor, device: torch.device) -> Tensor:
    """Copy host draws to the device, to a GPU of CUDA without waiting."""
    if device.type == "cuda" and not draws.is_cuda:
        draws = draws.pin_memory()
    # MPS before torch 2.13 reads the source later, when it may be freed (pytorch#189690)
    return draws.to(device, non_blocking=device.type == "cuda")


def pack_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy several host tensors to the device in one transfer."""
    if device.type == "cpu":
        return list(tensors)
    packed, places = pack(tensors)
    moved = to_device(packed, device)
    return [
        moved[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(places, tensors, strict=True)
    ]


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Pack tensors into one buffer of bytes with offsets."""
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]
    places = [0, *accumulate(sizes)]
    packed = torch.empty(places[-1], dtype=torch.uint8)
    for begin, tensor in zip(places, tensors, strict=False):
        packed[begin : begin + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    return packed, places[:-1]


class BatchRandom:
    """Draw for a batch, each sample from its own stream.

    Parameters are drawn on the CPU, where they need no synchronization. Only per-voxel noise is drawn on the device.

    Args:
        seed: The run's seed.
        stream: ``VIEWS``, or ``VALIDATION + VIEWS``.
        indices: Global sample index of each of the B samples.
        device: Where ``normal`` draws.
    """

    def __init__(self, seed: int, stream: int, indices: Sequence[int], device: torch.device) -> None:
        self._generators = [sample_generator(seed, stream, index) for index in indices]
        self.device = device

    def __len__(self) -> int:
        return len(self._generators)

    def of(self, samples: slice) -> BatchRandom:
        """Return the same streams for some of the samples."""
        result = copy(self)
        result._generators = self._generators[samples]
        return result

    def generator(self, sample: int) -> np.random.Generator:
        """Return the generator of one sample."""
        return self._generators[sample]

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw (B, *shape) float32 in [low, high) on the CPU."""
        draws = np.asarray([g.random(shape) for g in self._generators])
        values = (low + (high - low) * draws).astype(np.float32)
        # what is just below the end in float64 is the end in float32
        return torch.from_numpy(np.minimum(values, np.nextafter(np.float32(high), np.float32(low))))

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw (B, *shape) int64 in [low, high] on the CPU."""
        return torch.from_numpy(np.asarray([g.integers(low, high + 1, shape) for g in self._generators]))

    def chance(self, probability: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw (B, *shape) bool on the CPU."""
        return self.uniform(0.0, 1.0, shape) < probability

    def noise(self, sample: int) -> torch.Generator:
        """Return a device generator for one sample's noise."""
        return torch.Generator(self.device).manual_seed(self._seed(sample))

    def bits(self, sample: int) -> np.random.SFC64:
        """Return a fast source of random bits for one sample's noise on the CPU."""
        return np.random.SFC64(self._seed(sample))

    def _seed(self, sample: int) -> int:
        return int(self._generators[sample].integers(1 << 62))

    def normal(self, sample: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw one sample's standard normal noise."""
        return torch.randn(*shape, generator=self.noise(sample), device=self.device, dtype=dtype)


def shuffle_voxels(image: Tensor, random: BatchRandom) -> Tensor:
    """Shuffle the voxels of each sample, channels together: (B, C, D, H, W)."""
    flat = image.flatten(2)
    orders = [torch.randperm(flat.shape[2], generator=random.noise(b), device=image.device) for b in range(len(flat))]
    return torch.stack([row[:, order] for row, order in zip(flat, orders, strict=True)]).view_as(image)
