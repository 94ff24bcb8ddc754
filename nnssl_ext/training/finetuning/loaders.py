"""nnU-Net's own data loading and augmentation, made a function of (seed, batch): the same batches whatever the number
of workers, and after every interruption."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset

from nnssl_ext.data.loader import POLL_SECONDS, unanswered
from nnssl_ext.data.shard import TIMEOUT_SECONDS
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.finetuning.steps import leave_if_asked

if TYPE_CHECKING:
    from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune

TRAINING, VALIDATION = 0, 1


def run_seed(seed: int, fold: int | str) -> int:
    """The seed of one fold's run, another for each pair of seed and fold."""
    number = 1 << 16 if fold == "all" else int(fold)
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint32)[0])


class SeededBatches(Dataset):
    """nnU-Net's batches by their number.

    Args:
        batches: nnU-Net's loader with its transforms; it draws from the global generators.
        seed: The run's.
        stream: ``TRAINING`` or ``VALIDATION``.
    """

    def __init__(self, batches: nnUNetDataLoader, seed: int, stream: int) -> None:
        self.batches, self.seed, self.stream = batches, seed, stream

    def __getitem__(self, number: int) -> dict[str, Any]:
        states = np.random.SeedSequence((self.seed, self.stream, rank(), number)).generate_state(3, np.uint32)
        before = torch.get_rng_state()
        random.seed(int(states[0]))
        np.random.seed(int(states[1]))
        torch.manual_seed(int(states[2]))
        batch = self.batches.generate_train_batch()
        torch.set_rng_state(before)
        return batch


def seeded_loaders(trainer: nnsslTrainer_Finetune) -> tuple[Iterator[dict], Iterator[dict]]:
    """Endless iterators over training batches, from the trainer's step on, and over the validation batches."""
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    rotation, dummy_2d, initial_patch, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    labels = trainer.label_manager
    shared = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    augmentation = trainer.get_training_transforms(
        patch,
        rotation,
        scales,
        mirror,
        dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        **shared,
    )
    never_by_time(augmentation)
    plain = trainer.get_validation_transforms(scales, **shared)
    train, val = trainer.get_tr_and_val_datasets()
    train_batches = SeededBatches(_batches(trainer, train, initial_patch, augmentation), trainer.seed, TRAINING)
    val_batches = SeededBatches(_batches(trainer, val, patch, plain), trainer.seed, VALIDATION)
    workers = get_allowed_n_proc_DA()
    validation = _loader(val_batches, range(trainer.num_val_iterations_per_epoch), min(1, workers), trainer.device)
    training = _loader(train_batches, range(trainer.step, trainer.settings.steps), workers, trainer.device)

    def waiting() -> None:
        if world() == 1:
            leave_if_asked(trainer)

    return _patient(training, waiting), _again(validation, waiting)


def never_by_time(transform: Any) -> None:
    """Let no transform within ``transform`` choose its algorithm by its speed.

    nnU-Net's blur times a direct convolution and one by FFT in each process and takes the faster. They round
    differently, so that a run that goes on would now and then differ in the last bits from one that was never
    interrupted.
    """
    if getattr(transform, "benchmark", False):
        transform.benchmark = False
    for inner in [*getattr(transform, "transforms", []), *filter(None, [getattr(transform, "transform", None)])]:
        never_by_time(inner)


def _patient(loader: DataLoader, waiting: Callable[[], None]) -> Iterator[dict]:
    """A loader's batches; every few seconds without one ``waiting`` is called, which may raise.

    Raises:
        UserError: If a worker is gone, or there is no batch for a minute.
    """
    batches: Any = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler would raise amid an optimiser step; deaths are noticed where a batch is waited for
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    begin = time.monotonic()
    while True:
        try:
            with unanswered(lambda: _kill_workers(batches), TIMEOUT_SECONDS):
                batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            reason = str(error)
            if not isinstance(error, RuntimeError):
                reason = f"a worker exited unexpectedly while it handed a batch over: {error}"
            elif not reason.startswith("DataLoader "):
                raise  # a batch could not be made
            waiting()
            seconds = time.monotonic() - begin
            if "timed out" in reason and seconds < TIMEOUT_SECONDS:
                continue
            raise UserError(
                f"loader: no batch after {seconds:.0f} s ({reason}): a case is damaged or too large for the memory, "
                f"or a disk does not answer. See to it, then go on with --c"
            ) from error
        yield batch
        begin = time.monotonic()


def _kill_workers(batches: Any) -> None:
    for worker in getattr(batches, "_workers", []):
        worker.kill()


def _batches(trainer: nnsslTrainer_Finetune, cases: Any, read_size: Any, transforms: Any) -> nnUNetDataLoader:
    return nnUNetDataLoader(
        cases,
        trainer.batch_size,
        read_size,
        trainer.configuration_manager.patch_size,
        trainer.label_manager,
        oversample_foreground_percent=trainer.oversample_foreground_percent,
        sampling_probabilities=None,
        pad_sides=None,
        transforms=transforms,
        probabilistic_oversampling=trainer.probabilistic_oversampling,
    )


def _loader(batches: SeededBatches, numbers: range, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=3 if workers else None,
        persistent_workers=workers > 0,
        timeout=POLL_SECONDS if workers else 0,
        worker_init_fn=_start_worker,
    )


def _again(loader: DataLoader, waiting: Callable[[], None]) -> Iterator[dict]:
    while True:
        yield from _patient(loader, waiting)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
