"""Load data with workers that are replaced when lost.

Samples are pure functions of their number, so new workers continue with the batch that is due.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import blosc2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from nnssl_ext.data.crops import collate
from nnssl_ext.errors import UserError
from nnssl_ext.signals import ignore_in_worker

#: Seconds between two looks at the workers while there is no batch, and without progress until one counts as hung.
POLL_SECONDS, HANG_SECONDS = 5, 45
#: Replacements in a row without a batch in between.
REPLACEMENTS = 3
#: Seconds that the end of the workers may take before they are left alone.
END_SECONDS = 10
#: Batches that a worker prefetches, and bytes that all of them prefetch together; half of the shared memory at most.
PREFETCHED, PREFETCHED_BYTES = 3, 4 * 2**30
#: Open files that are enough for all batches that wait.
OPEN_FILES = 2**16
_IDLE = -1


@dataclass
class Shard(Sampler[list[int]]):
    """List one rank's samples, batch by batch.

    Of each global batch every ``world``-th, from ``rank`` on.

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


@dataclass
class Failure:
    """Tell why a batch could not be read, in its place. A ``UserError`` would end the worker."""

    text: str


class SteadyLoader:
    """Iterate over the batches of a shard.

    Args:
        dataset: Samples by number. ``sources(sample)`` names what a sample is read from, and ``sample_bytes()``
            estimates the memory of a sample.
        shard: The numbers.
        workers: Processes that read; with 0 this process does. The order of batches does not depend on it.
        pin_memory: As for torch's DataLoader.
        log: Called with a line for each replacement.
        waiting: Called every few seconds while there is no batch; may raise.
        join: Makes a batch of samples.
    """

    def __init__(
        self,
        dataset: Any,
        shard: Shard,
        *,
        workers: int,
        pin_memory: bool,
        log: Callable[[str], None],
        waiting: Callable[[], None],
        join: Callable[[list], Any] = collate,
    ) -> None:
        self.dataset, self.shard, self.workers, self.pin_memory = dataset, shard, workers, pin_memory
        self.log, self.waiting, self.join = log, waiting, join

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[Any]:
        at, failures = self.shard.first, 0
        while at < self.shard.last:
            with _Crew(self, replace(self.shard, first=at)) as crew:
                while at < self.shard.last:
                    batch = crew.next(self.waiting)
                    if crew.problem:
                        break
                    if isinstance(batch, Failure):
                        raise UserError(batch.text)
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
            self.log(f"WARNING: loader: {crew.problem}; it is replaced, and no batch is lost")


class Progress:
    """Count what workers have read, in shared memory."""

    def __init__(self, workers: int) -> None:
        self._counts = multiprocessing.Array("q", max(1, workers), lock=False)

    def tick(self) -> None:
        """Count one step of this worker."""
        self._counts[_place()] += 1

    @property
    def total(self) -> int:
        return sum(self._counts)


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may. Each tensor of a waiting batch holds two."""
    with suppress(ImportError, OSError, ValueError):  # no such module on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if 0 <= soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def prefetching(batch_bytes: int, workers: int) -> tuple[int, int]:
    """Limit what is prefetched.

    Args:
        batch_bytes: Estimated memory of a batch.
        workers: Workers that are wanted.

    Returns:
        Workers, and batches that each of them prefetches.
    """
    limit = PREFETCHED_BYTES
    with suppress(OSError):  # no such folder on this system
        limit = min(limit, shutil.disk_usage("/dev/shm").free // 2)
    batches = max(1, limit // max(1, batch_bytes))
    workers = min(workers, batches)
    return workers, min(PREFETCHED, batches // workers) if workers else 0


class _Crew:
    """Run the workers of one DataLoader."""

    def __init__(self, loader: SteadyLoader, shard: Shard) -> None:
        samples = -(-shard.batch_size // shard.world)
        self.dataset = loader.dataset
        self.workers, prefetched = prefetching(samples * loader.dataset.sample_bytes(), loader.workers)
        #: The sample that each worker reads now.
        self.reading = multiprocessing.Array("q", [_IDLE] * max(1, self.workers), lock=False)
        self.progress = Progress(self.workers)
        if self.workers:
            allow_open_files()
        before = set(multiprocessing.active_children())
        self.batches: Any = iter(
            DataLoader(
                _Watched(loader.dataset, self.reading, self.progress) if self.workers else loader.dataset,
                batch_sampler=shard,
                collate_fn=loader.join,
                num_workers=self.workers,
                pin_memory=loader.pin_memory,
                prefetch_factor=prefetched or None,
                timeout=POLL_SECONDS if self.workers else 0,
                worker_init_fn=_start_worker,
            )
        )
        self.processes = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid or 0)
        #: Which worker was lost, how, and what it was reading.
        self.problem = ""
        in_main = threading.current_thread() is threading.main_thread()
        if self.workers and in_main and hasattr(signal, "SIGCHLD"):  # Windows has none
            # torch's handler would raise within an optimizer step; deaths are noticed while waiting for a batch
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # torch asks its workers to end and waits, without end where one is stopped or hangs
        if self.problem or kind is not None:
            self._kill()
        end, self.batches = getattr(self.batches, "_shutdown_workers", None), None
        if end is None:
            return
        # it also waits for its pinning thread, without end where that waits for a dead worker (pytorch#21554)
        ending = threading.Thread(target=end, name="end of workers", daemon=True)
        ending.start()
        ending.join(END_SECONDS)
        if ending.is_alive():
            self._kill()
            ending.join(END_SECONDS)

    def next(self, waiting: Callable[[], None]) -> Any:
        """Return the next batch, or note a lost worker."""
        begin, count = time.monotonic(), self.progress.total
        while True:
            asked = time.monotonic()
            try:
                with unanswered(self._give_up, HANG_SECONDS):
                    return next(self.batches)
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if not self.workers or str(error).startswith("Caught "):
                    raise  # a batch that could not be made, which no wait brings back
                if not isinstance(error, RuntimeError) and not self.problem:
                    # it died while handing over a batch, which shows before its death does
                    self._reap()
                if self.problem:
                    return None
                if self.progress.total != count:  # slow is not hung
                    begin, count = time.monotonic(), self.progress.total
                waited = time.monotonic() - begin
                if any(not process.is_alive() for process in self.processes):
                    self.problem = self._lost("was killed")
                elif waited > HANG_SECONDS - POLL_SECONDS / 2:
                    self.problem = self._lost(f"gave no batch for {waited:.0f} s")
                elif isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                    raise
                elif time.monotonic() - asked < POLL_SECONDS - 1:
                    raise  # not the end of a wait
                if self.problem:
                    return None
                waiting()

    def _reap(self) -> None:
        ending = wait([process.sentinel for process in self.processes], timeout=POLL_SECONDS)
        for process in self.processes:
            if process.sentinel in ending:
                process.join(POLL_SECONDS)

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
        """Name the worker and what it was reading."""
        dead = [place for place, process in enumerate(self.processes) if not process.is_alive()]
        places = dead or [place for place, sample in enumerate(self.reading) if sample != _IDLE]
        samples = [self.reading[place] for place in places if self.reading[place] != _IDLE]
        pids = ", ".join(str(self.processes[place].pid) for place in places) or "unknown"
        what = "; ".join(f"sample {s} ({', '.join(self.dataset.sources(s))})" for s in samples) or "nothing"
        if dead and (code := self.processes[dead[0]].exitcode) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"worker {pids} {how} while reading {what}"


@contextmanager
def unanswered(give_up: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call ``give_up`` if the block takes longer.

    A batch is fetched from the worker that made it. If that one is stopped, the fetch has no time limit of its own, and
    only the worker's death ends it.
    """
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Watched(Dataset):
    """Show the main process what is being read."""

    def __init__(self, dataset: Any, reading: Any, progress: Progress) -> None:
        self.dataset, self.reading, self.progress = dataset, reading, progress
        watch = getattr(dataset, "watch", None)
        if watch is not None:  # a sample that takes long has steps of its own
            watch(progress.tick)

    def __getitem__(self, sample: int) -> Any:
        place = _place()
        self.reading[place] = sample
        result = self.dataset[sample]
        self.progress.tick()
        self.reading[place] = _IDLE
        return result


def _place() -> int:
    info = get_worker_info()
    return info.id if info is not None else 0


def _start_worker(_: int) -> None:
    gc.freeze()  # a collection here must not free the pinned batches of the parent
    ignore_in_worker()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
