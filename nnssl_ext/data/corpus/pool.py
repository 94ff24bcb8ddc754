"""Run work in processes that may die, one item each.

``concurrent.futures`` gives up all items when one worker dies, and waits forever for one that hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nnssl_ext.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Modules that a new worker finds imported.
PRELOADED = ("nnssl_ext.data.corpus.preparation",)
#: Share of the free memory that one item may take.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Lost:
    """An item that ended its worker.

    Attributes:
        reason: For the manifest.
        crowded: Whether it may succeed with no other item beside it.
    """

    reason: str
    crowded: bool = False


@dataclass
class _Worker:
    process: Any
    connection: Connection
    item: int = -1
    deadline: float = float("inf")

    def kill(self) -> None:
        """End the worker and what it has started."""
        if hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True, check=False)
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerPool:
    """Run ``work`` on items in processes of their own.

    Args:
        work: A function that can be pickled. Its exceptions end the iteration, except MemoryError.
        seconds: Time limit of an item.
    """

    def __init__(self, work: Callable[[Any], Any], processes: int, seconds: Callable[[Any], float]) -> None:
        self.work, self.processes, self.seconds = work, processes, seconds
        self._context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        if hasattr(self._context, "set_forkserver_preload"):
            self._context.set_forkserver_preload(list(PRELOADED))
        self._workers: list[_Worker] = []

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yield each item's result in order, or ``Lost``.

        Raises:
            UserError: If a worker cannot start.
        """
        results: dict[int, Any] = {}
        waiting, crowded = iter(range(len(items))), list[int]()
        upcoming = next(waiting, None)
        try:
            for turn in range(len(items)):
                while turn not in results:
                    busy = [worker for worker in self._workers if worker.item >= 0]
                    if crowded:  # one after the other, with no other item beside it
                        if not busy:
                            self._give(items, crowded[0])
                    elif upcoming is not None and len(busy) < self.processes:
                        self._give(items, upcoming)
                        upcoming = next(waiting, None)
                        continue
                    for number, result in self._finished(items):
                        alone = number in crowded or self.processes == 1
                        if isinstance(result, Lost) and result.crowded and not alone:
                            crowded.append(number)
                            continue
                        results[number] = result
                        if number in crowded:
                            crowded.remove(number)
                yield results.pop(turn)
        finally:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def _give(self, items: Sequence[Any], number: int) -> None:
        """Send an item to a free or new worker."""
        worker = next((worker for worker in self._workers if worker.item < 0), None) or self._start()
        worker.item, worker.deadline = number, time.monotonic() + self.seconds(items[number])
        with suppress(OSError):  # it has died; ``_finished`` finds out
            worker.connection.send(items[number])

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv()  # it is ready
        except (EOFError, OSError) as error:
            process.join()
            raise UserError(f"Expected a worker process, got one that ended with status {process.exitcode}.") from error
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _finished(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Wait for a result, a death or a deadline."""
        busy = {worker.connection: worker for worker in self._workers if worker.item >= 0}
        patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
        for connection in wait(list(busy), max(0.0, patience)):
            worker = busy[connection]  # type: ignore[index]
            try:
                result = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                result = _death(worker.process.exitcode)
                self._discard(worker)
            if isinstance(result, BaseException):
                raise result
            yield worker.item, result
            worker.item, worker.deadline = -1, float("inf")
        for worker in busy.values():
            if worker.item >= 0 and time.monotonic() > worker.deadline:
                self._discard(worker)
                yield worker.item, Lost(f"took more than {self.seconds(items[worker.item]):.0f} s to read")

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _death(code: int) -> Lost:
    name = signal.Signals(-code).name if code < 0 else f"status {code}"
    memory = code == -getattr(signal, "SIGKILL", 9)
    return Lost(f"ended its reader ({name}{', most likely for want of memory' if memory else ''})", crowded=memory)


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """Work until the connection ends."""
    _isolate()
    soft = resource.getrlimit(resource.RLIMIT_AS)[0] if resource is not None else 0
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        _limit_memory(soft)  # what is free changes with the other workers
        try:
            result = work(item)
        except MemoryError:
            result = Lost("needs more memory than there is", crowded=True)
        except BaseException as error:
            result = error
        connection.send(result)


def _isolate() -> None:
    """Ignore the terminal, print nothing, and end with the parent."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # C libraries write there
        os.dup2(nothing, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _limit_memory(soft: int) -> None:
    """Let what does not fit end in a MemoryError. ``soft`` is the limit that the process began with."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limits = [limit for limit in (soft, hard, _memory_limit()) if limit > 0]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits, default=soft), hard))


def _memory_limit() -> int:
    """Return a worker's address space limit, 0 if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        own = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, KeyError, ValueError):
        return 0
    with suppress(OSError, ValueError):  # a container may have less; "max" is no number
        free = min(free, _free_in_container(Path("/sys/fs/cgroup")))
    return own + int(MEMORY_SHARE * free)


def _free_in_container(group: Path) -> int:
    """Return the bytes that a control group may still use. Files that the system keeps in memory make room."""
    most, used = (int((group / f"memory.{name}").read_text("ascii")) for name in ("max", "current"))
    rows = (line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
    kept = sum(int(number) for name, number in rows if name in ("inactive_file", "active_file", "slab_reclaimable"))
    return most - used + kept


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
