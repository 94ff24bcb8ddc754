"""From global sample indices to batches: torch's DataLoader over ``CropDataset``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import blosc2
from torch.utils.data import DataLoader, Dataset, Sampler

from nnssl_ext.data.crops import CropBatch, collate
from nnssl_ext.data.samples import SampleDataset

#: Without a batch for this long a wait ends with an error.
TIMEOUT_SECONDS = 60


@dataclass
class Shard(Sampler[list[int]]):
    """The sample indices of one rank, batch by batch: of each global batch every ``world``-th, from ``rank`` on.

    Args:
        first, last: Global batches first..last-1.
        batch_size: Samples of a global batch.
        rank, world: This process and how many there are.
    """

    first: int
    last: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.last):
            begin = batch * self.batch_size
            yield list(range(begin + self.rank, begin + self.batch_size, self.world))

    def __len__(self) -> int:
        return max(0, self.last - self.first)


def crop_loader(
    dataset: SampleDataset,
    shard: Shard,
    *,
    workers: int,
    pin_memory: bool,
    timeout: float = TIMEOUT_SECONDS,
) -> DataLoader[CropBatch]:
    """The loader of a shard; ``workers`` 0 reads in this process. The order never depends on ``workers``."""
    return DataLoader(
        cast(Dataset, dataset),
        batch_sampler=shard,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=3 if workers else None,
        timeout=timeout if workers else 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    blosc2.set_nthreads(1)
