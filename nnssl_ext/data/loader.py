"""Batches whatever becomes of the workers: one that was killed or hangs is named and replaced, nothing waits for ever.

Samples are pure functions of their number, so that new workers go on with the very batch that was due.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from nnssl_ext.data.crops import CropBatch, Sample
from nnssl_ext.data.samples import SampleDataset
from nnssl_ext.data.shard import Shard, crop_loader
from nnssl_ext.errors import UserError

#: How often a wait for a batch looks about, and after how long without any a worker counts as hanging.
POLL_SECONDS, HANG_SECONDS = 5, 45
#: So often in a row workers are replaced without a batch in between.
REPLACEMENTS = 3
_IDLE = -1


@contextmanager
def unanswered(give_up: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call ``give_up`` from another thread if what is within takes longer.

    A batch is fetched from the worker that made it. Where that one is stopped, the wait for its answer has no limit of
    its own, and only the worker's death ends it.
    """
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class SteadyLoader:
    """The batches of a shard, as often as one iterates.

    Args:
        dataset: Samples by number; ``sources(sample)`` says what a sample is read from.
        shard: Which numbers.
        workers: Processes that read; with 0 this process does.
        pin_memory: As for torch's DataLoader.
        tell: Called with a line for each replacement.
        waiting: Called every few seconds while there is no batch; may raise.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        shard: Shard,
        *,
        workers: int,
        pin_memory: bool,
        tell: Callable[[str], None],
        waiting: Callable[[], None],
    ) -> None:
        self.dataset, self.shard, self.workers, self.pin_memory = dataset, shard, workers, pin_memory
        self.tell, self.waiting = tell, waiting

    def __repr__(self) -> str:
        return f"SteadyLoader({self.dataset!r}, batches {self.shard.first} to {self.shard.last})"

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[CropBatch]:
        at, failures = self.shard.first, 0
        while at < self.shard.last:
            with _Crew(self.dataset, replace(self.shard, first=at), self.workers, self.pin_memory) as crew:
                while at < self.shard.last:
                    batch = crew.next(self.waiting)
                    if batch is None:
                        break
                    at, failures = at + 1, 0
                    yield batch
                else:
                    return
                failures += 1
            if failures > REPLACEMENTS:
                raise UserError(
                    f"loader: {crew.problem}, {failures} times in a row: these cases are damaged or too large for the "
                    f"memory (fewer workers need less: nnUNet_n_proc_DA). Look at them, then go on with --c"
                )
            self.tell(f"WARNING: loader: {crew.problem}; it is replaced, and no batch is lost")


class _Crew:
    """The workers of one DataLoader, from its first batch to its end."""

    def __init__(self, dataset: SampleDataset, shard: Shard, workers: int, pin_memory: bool) -> None:
        self.dataset, self.workers = dataset, workers
        #: The sample that each worker reads now.
        self.reading = multiprocessing.Array("q", [_IDLE] * max(1, workers), lock=False)
        before = set(multiprocessing.active_children())
        noting: Any = _Noting(dataset, self.reading) if workers else dataset
        loader = crop_loader(noting, shard, workers=workers, pin_memory=pin_memory, timeout=POLL_SECONDS)
        self.batches: Any = iter(loader)
        self.processes = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid or 0)
        #: Which worker was lost, how, and what it was reading.
        self.problem = ""
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise amid an optimiser step; deaths are noticed where a batch is waited for
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # torch asks its workers to end and waits, for ever where one is stopped or hangs
        if self.problem or kind is not None:
            self._kill()
        self.batches = None

    def next(self, waiting: Callable[[], None]) -> CropBatch | None:
        """The next batch; None if a worker is dead or hangs."""
        begin = time.monotonic()
        while True:
            try:
                with unanswered(self._give_up, HANG_SECONDS):
                    return next(self.batches)
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if not isinstance(error, RuntimeError) and not self.problem:
                    # it died while handing over a batch, which shows before its death does
                    ending = wait([process.sentinel for process in self.processes], timeout=POLL_SECONDS)
                    for process in self.processes:
                        if process.sentinel in ending:
                            process.join(POLL_SECONDS)
                if self.problem:
                    return None
                waited = time.monotonic() - begin
                if any(not process.is_alive() for process in self.processes):
                    self.problem = self._lost("was killed")
                elif waited > HANG_SECONDS - POLL_SECONDS / 2:
                    self.problem = self._lost(f"gave no batch for {waited:.0f} s")
                elif isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                    raise  # a batch that could not be made, which no wait brings back
                elif not self.workers or waited < POLL_SECONDS - 1:
                    raise  # not the end of a wait
                if self.problem:
                    return None
                waiting()

    def _give_up(self) -> None:
        if not self.processes:
            return
        self.problem = self._lost(f"gave no batch for {HANG_SECONDS} s")
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            with suppress(OSError, ValueError):
                process.kill()

    def _lost(self, how: str) -> str:
        """Which worker it was and what it was reading."""
        dead = [place for place, process in enumerate(self.processes) if not process.is_alive()]
        places = dead or [place for place, sample in enumerate(self.reading) if sample != _IDLE]
        samples = [self.reading[place] for place in places if self.reading[place] != _IDLE]
        pids = ", ".join(str(self.processes[place].pid) for place in places) or "unknown"
        what = "; ".join(f"sample {s} ({', '.join(self.dataset.sources(s))})" for s in samples) or "nothing"
        if dead and (code := self.processes[dead[0]].exitcode) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"worker {pids} {how} while reading {what}"


class _Noting(Dataset):
    """A dataset that writes down which sample it is reading, where the main process can see it."""

    def __init__(self, dataset: SampleDataset, reading: Any) -> None:
        self.dataset, self.reading = dataset, reading

    def __getitem__(self, sample: int) -> Sample:
        info = get_worker_info()
        place = info.id if info is not None else 0
        self.reading[place] = sample
        result = self.dataset[sample]
        self.reading[place] = _IDLE
        return result
