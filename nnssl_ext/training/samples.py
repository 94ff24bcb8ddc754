"""Where a pretraining's batches come from: crops of a fold's cases, or 2-D images; and what of them cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from nnssl_ext.data.cases import shorten
from nnssl_ext.data.crops import CropBatch, CropDataset
from nnssl_ext.data.images import ImageDataset, ImageRequest
from nnssl_ext.data.loader import Shard, crop_loader
from nnssl_ext.environment import worker_count
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed import rank, world
from nnssl_ext.views.random import VALIDATION

if TYPE_CHECKING:
    from nnssl_ext.training.trainer import PretrainingTrainer


def sample_loaders(trainer: PretrainingTrainer) -> tuple[Iterator[CropBatch], Iterable[CropBatch]]:
    """One iterator over all training batches that are left, and a loader of the validation batches."""
    train, val = _datasets(trainer)
    workers, pin = worker_count(), trainer.device.type == "cuda"
    steps = trainer.num_iterations_per_epoch
    left = Shard(trainer.current_epoch * steps, trainer.num_epochs * steps, trainer.batch_size, rank(), world())
    validation = Shard(0, trainer.num_val_iterations_per_epoch, trainer.batch_size, rank(), world())
    return (
        iter(crop_loader(train, left, workers=workers, pin_memory=pin)),
        crop_loader(val, validation, workers=min(1, workers), pin_memory=pin),
    )


def _datasets(trainer: PretrainingTrainer) -> tuple[CropDataset | ImageDataset, CropDataset | ImageDataset]:
    checked, seed = trainer.checked, trainer.checked.common.seed
    request = trainer.method.crops(checked.settings, checked.geometry)
    if isinstance(request, ImageRequest):
        assert checked.images is not None
        trainer.print_to_log_file(f"{checked.images}; this data set's own images are not used.")
        return ImageDataset(checked.images, request, seed), ImageDataset(checked.images, request, seed, VALIDATION)
    train_cases, val_cases = trainer.do_split()
    if trainer.fold == "all":
        trainer.print_to_log_file("Fold 'all': the objective is validated on crops of the training cases.")
    if len(val_cases) < request.fewest_cases:
        trainer.print_to_log_file(f"{len(val_cases)} validation cases are too few: using training cases instead.")
        val_cases = train_cases
    return (
        CropDataset(checked.index, train_cases, request, seed),
        CropDataset(checked.index, val_cases, request, seed, VALIDATION),
    )


class Unreadable:
    """What could not be read in this run and was replaced.

    Args:
        total: How many there are to read.
        limit: Largest share of them that may be unreadable.
        tell: Called with a line for each new one.
    """

    def __init__(self, total: int, limit: float, tell: Callable[[str], None]) -> None:
        self.total, self.limit, self.tell = total, limit, tell
        self.names: list[str] = []

    def __repr__(self) -> str:
        return f"Unreadable({len(self.names)} of {self.total})"

    def note(self, names: Iterable[str]) -> None:
        """Name each one once.

        Raises:
            UserError: When they are too many.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        for name in new:
            self.names.append(name)
            self.tell(f"cannot be read and is skipped ({len(self.names)} so far): {name}")
        if new and len(self.names) > self.limit * self.total:
            raise UserError(
                f"{len(self.names)} of {self.total} images cannot be read, more than most_unreadable={self.limit} "
                f"allows: {shorten(self.names)}; repair or remove them, then go on with --c"
            )
