"""Load samples and list what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nnssl_ext.data.cases import shorten
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.data.loader import Shard, SteadyLoader
from nnssl_ext.data.samples import Datasets
from nnssl_ext.environment import worker_count
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world


def sample_loaders(
    datasets: Datasets,
    batch_size: int,
    steps: range,
    validation_batches: int,
    *,
    pin_memory: bool,
    log: Callable[[str], None],
    waiting: Callable[[], None],
) -> tuple[Iterator[CropBatch], Iterable[CropBatch]]:
    """Return the remaining training batches and the validation loader.

    Args:
        datasets: Training and validation samples.
        batch_size: Samples per step over all processes.
        steps: Training steps that are left.
        validation_batches: Batches of a validation.
        pin_memory: As for torch's DataLoader.
        log: Called with a line when a worker is replaced.
        waiting: Called every few seconds while there is no batch; may raise.
    """
    training, validation = datasets
    workers = worker_count()

    def loader(dataset: object, batches: range, workers: int) -> SteadyLoader:
        shard = Shard(batches.start, batches.stop, batch_size, rank(), world())
        return SteadyLoader(dataset, shard, workers=workers, pin_memory=pin_memory, log=log, waiting=waiting)

    return iter(loader(training, steps, workers)), loader(validation, range(validation_batches), min(1, workers))


class Unreadable:
    """List unreadable cases or images, which are replaced.

    Args:
        kind: Plural noun for messages.
        total: How many there are to read.
        limit: Largest fraction of them that may be unreadable.
        log: Called with a line for each new one.
    """

    def __init__(self, kind: str, total: int, limit: float, log: Callable[[str], None]) -> None:
        self.kind, self.total, self.limit, self.log = kind, total, limit, log
        self.names: list[str] = []

    def note(self, names: Iterable[str]) -> None:
        """Log each name once.

        The text after ': ' in a name is the reason.

        Raises:
            UserError: If there are too many.
        """
        known = {name.partition(": ")[0] for name in self.names}
        new = list({name.partition(": ")[0]: name for name in names if name.partition(": ")[0] not in known}.values())
        for name in new:
            self.names.append(name)
            self.log(f"cannot be read and is skipped ({len(self.names)} so far): {name}")
        if new and len(self.names) > self.limit * self.total:
            raise UserError(
                f"{len(self.names)} of {self.total} {self.kind} cannot be read, more than max_unreadable_fraction="
                f"{self.limit} allows: {shorten(self.names, 20)}. Repair or remove them, then go on with --c"
            )
