"""Where a pretraining's batches come from: crops of a fold's cases, or 2-D images; and what of them cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from nnssl_ext.data.cases import shorten
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.data.loader import SteadyLoader
from nnssl_ext.data.shard import Shard
from nnssl_ext.environment import worker_count
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.distributed.store import from_the_first
from nnssl_ext.training.pretraining.steps import leave_if_asked

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer


def sample_loaders(trainer: PretrainingTrainer) -> tuple[Iterator[CropBatch], Iterable[CropBatch]]:
    """One iterator over all training batches that are left, and a loader of the validation batches."""
    checked = trainer.checked
    request = trainer.method.crops(checked.settings, checked.geometry)
    # nnU-Net writes a split where there is none yet
    train, val = checked.samples.datasets(
        request, checked.common.seed, lambda: from_the_first("split", trainer.do_split), trainer.print_to_log_file
    )
    workers, pin = worker_count(), trainer.device.type == "cuda"
    left = Shard(
        trainer.step, trainer.num_epochs * trainer.num_iterations_per_epoch, trainer.batch_size, rank(), world()
    )
    validation = Shard(0, trainer.num_val_iterations_per_epoch, trainer.batch_size, rank(), world())
    tell = trainer.print_to_log_file

    def waiting() -> None:
        if world() == 1:
            leave_if_asked(trainer)

    training = SteadyLoader(train, left, workers=workers, pin_memory=pin, tell=tell, waiting=waiting)
    return iter(training), SteadyLoader(
        val, validation, workers=min(1, workers), pin_memory=pin, tell=tell, waiting=lambda: None
    )


class Unreadable:
    """What could not be read in this run and was replaced.

    Args:
        what: Of what.
        total: How many there are to read.
        limit: Largest share of them that may be unreadable.
        tell: Called with a line for each new one.
    """

    def __init__(self, what: str, total: int, limit: float, tell: Callable[[str], None]) -> None:
        self.what, self.total, self.limit, self.tell = what, total, limit, tell
        self.names: list[str] = []

    def __repr__(self) -> str:
        return f"Unreadable({len(self.names)} of {self.total})"

    def note(self, names: Iterable[str]) -> None:
        """Name each one once; what follows ': ' in a name is the reason.

        Raises:
            UserError: When they are too many.
        """
        known = {name.partition(": ")[0] for name in self.names}
        new = list({name.partition(": ")[0]: name for name in names if name.partition(": ")[0] not in known}.values())
        for name in new:
            self.names.append(name)
            self.tell(f"cannot be read and is skipped ({len(self.names)} so far): {name}")
        if new and len(self.names) > self.limit * self.total:
            raise UserError(
                f"{len(self.names)} of {self.total} {self.what} cannot be read, more than max_unreadable_fraction="
                f"{self.limit} allows: {shorten(self.names, 20)}; repair or remove them, then go on with --c"
            )


def unreadable(trainer: PretrainingTrainer) -> Unreadable:
    """The list of a run that begins, with the cases that are left out from the start."""
    samples, limit = trainer.checked.samples, trainer.checked.common.max_unreadable_fraction
    result = Unreadable(samples.kind, len(samples), limit, trainer.print_to_log_file)
    result.note(samples.left_out())
    return result
