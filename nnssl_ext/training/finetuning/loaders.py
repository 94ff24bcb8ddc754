"""Load nnU-Net's own batches as a function of (seed, batch).

Batches do not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch.utils.data import Dataset

from nnssl_ext.data.loader import Failure
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank

TRAINING, VALIDATION = 0, 1


def run_seed(seed: int, fold: int | str) -> int:
    """Derive the seed of a run from seed and fold."""
    number = 1 << 16 if fold == "all" else int(fold)
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint32)[0])


class SeededBatches(Dataset):
    """nnU-Net's batches by their number.

    Its loader draws from the global generators. ``stream`` is ``TRAINING`` or ``VALIDATION``.
    """

    def __init__(self, batches: nnUNetDataLoader, seed: int, stream: int, channels: int) -> None:
        self.batches, self.seed, self.stream, self.channels = batches, seed, stream, channels
        self._reader = batches._data.load_case = _Reader(batches._data)

    def __getitem__(self, number: int) -> dict[str, Any] | Failure:
        states = np.random.SeedSequence((self.seed, self.stream, rank(), number)).generate_state(3, np.uint32)
        before = torch.get_rng_state()
        random.seed(int(states[0]))
        np.random.seed(int(states[1]))
        torch.manual_seed(int(states[2]))
        try:
            return self.batches.generate_train_batch()
        except UserError as error:
            return Failure(error.line)
        finally:
            torch.set_rng_state(before)

    def watch(self, tick: Callable[[], None]) -> None:
        """Call ``tick`` for each case of a batch. A slow batch then does not look like a hung worker."""
        self._reader.tick = tick

    def sources(self, number: int) -> list[str]:
        """Name a batch for messages. Its cases are drawn only while it is made."""
        return [f"batch {number} of the {'validation' if self.stream else 'training'}"]

    def sample_bytes(self) -> int:
        """Estimate the memory of a batch. It holds the image, and labels of two bytes at all resolutions."""
        voxels = int(np.prod(self.batches.final_patch_size))
        return self.batches.batch_size * voxels * (4 * self.channels + 4)


class _Reader:
    """Read nnU-Net's cases, and count and name them."""

    def __init__(self, cases: nnUNetBaseDataset) -> None:
        self.cases, self.tick = cases, _uncounted

    def __call__(self, name: str) -> Any:
        self.tick()
        try:
            return type(self.cases).load_case(self.cases, name)  # its own load_case is this reader
        except Exception as error:  # damaged files raise anything
            raise UserError(
                f"case '{name}' in {self.cases.source_folder} cannot be read: {type(error).__name__}: {error}. Repair "
                f"it or preprocess it again (nnUNetv2_preprocess), then go on with --c"
            ) from error


def _uncounted() -> None:
    pass


def never_by_time(transform: Any) -> None:
    """Keep all transforms from choosing algorithms by speed.

    nnU-Net's blur times a direct convolution and one by FFT in each process and takes the faster one. They round
    differently: a continued run would now and then differ in the last bits from an uninterrupted one.
    """
    if getattr(transform, "benchmark", False):
        transform.benchmark = False
    for inner in [*getattr(transform, "transforms", []), *filter(None, [getattr(transform, "transform", None)])]:
        never_by_time(inner)
