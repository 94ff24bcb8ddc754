"""End all processes of a run when one of them fails.

torchrun restarts or ends the processes of one machine only, and NCCL's watchdog waits for minutes and covers GPU
collectives only. Gloo on CPUs, input checks before a process group exists, and several machines have neither.

A thread in each process raises a counter in the shared store every few seconds and looks at the others' counters. It
does not depend on the backend, which may wait for minutes or for ever. An error that all have is said once, by the
first of them.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.distributed.store import MEETING, shared_store

#: Between two beats; until a silent process counts as gone; for the first process to say an error that all have.
BEAT_SECONDS, SILENCE_SECONDS, GRACE_SECONDS = 2.0, 30.0, 4.0
_POLL_SECONDS = 0.1
_DONE, _FAILED, _SAID = "done", "failed ", "said "


class Heartbeat:
    """Watch the other processes within a context.

    It does nothing for a single process, or within another heartbeat. ``number`` of ``count`` is this process's rank,
    before there is a process group.

    An error that leaves it is printed and becomes ``SystemExit(1)``, in the other processes too.
    """

    _on = False
    _generation = 0

    def __init__(self, number: int | None = None, count: int | None = None) -> None:
        self.number = rank() if number is None else number
        self.count = world() if count is None else count
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._unanswered = 0

    def __enter__(self) -> Heartbeat:
        if self.count > 1 and not Heartbeat._on:
            Heartbeat._on = True
            Heartbeat._generation += 1
            self._store = dist.PrefixStore(f"beat{Heartbeat._generation}", shared_store())
            self._come_together()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_the_store, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        try:
            clean = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
            if error is not None and not clean and _of_the_backend(error):
                # another process is gone: the thread ends us, with a better word for it
                self._thread.join(2 * SILENCE_SECONDS)
            self._stop.set()
            self._thread.join()
            if clean:
                self._end_with(_DONE)
            elif isinstance(error, (Exception, SystemExit)):
                self._fail(error)
            else:  # an interrupt by hand
                self._end_with(_SAID)
        finally:
            Heartbeat._on = False

    def _come_together(self) -> None:
        """Wait until all processes are there."""
        self._store.set(f"beat{self.number}", "0")
        self._store.set(f"who{self.number}", f"pid {os.getpid()} on {socket.gethostname()}")
        deadline = time.monotonic() + MEETING.total_seconds()
        missing = list(range(self.count))
        while missing := [other for other in missing if not self._store.check([f"who{other}"])]:
            if time.monotonic() > deadline:
                raise UserError(f"of {self.count} processes these did not come: {missing}. Start all of them")
            time.sleep(_POLL_SECONDS)
        self._who = self._all("who")

    def _all(self, what: str) -> list[str]:
        return [value.decode() for value in self._store.multi_get([f"{what}{other}" for other in range(self.count)])]

    def _end_with(self, word: str) -> None:
        """Record how this process ended. The first process ends last, since it may hold the store."""
        with suppress(RuntimeError):  # the store is gone with its process
            self._store.set(f"beat{self.number}", word)
            deadline = time.monotonic() + SILENCE_SECONDS
            while self.number == 0 and time.monotonic() < deadline and not all(map(_final, self._all("beat"))):
                time.sleep(_POLL_SECONDS)

    def _fail(self, error: BaseException) -> NoReturn:
        line = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):
            self._store.set(f"beat{self.number}", _FAILED + line)
            if self._said_by_another(line):
                self._end_with(_SAID)
                raise SystemExit(1)
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif not isinstance(error.code, int):
            where = f" [process {self.number} of {self.count}, {self._who[self.number]}]" if self.number else ""
            print(f"{error.code}{where}", file=sys.stderr, flush=True)
        # only now: whoever started us may end us as soon as another process has ended
        self._end_with(_SAID + line)
        raise SystemExit(1)

    def _said_by_another(self, line: str) -> bool:
        """Return whether an earlier process reports the same error."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self.number and time.monotonic() < deadline:
            before = self._all("beat")[: self.number]
            if any(beat in (_FAILED + line, _SAID + line) for beat in before):
                return True
            if all(map(_final, before)):
                return False
            time.sleep(_POLL_SECONDS)
        return False

    def _watch(self) -> None:
        # silence is counted in looks, not in seconds: after a pause of the whole machine nobody is gone
        seen = {other: ("", 0) for other in range(self.count) if other != self.number}
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._store.set(f"beat{self.number}", str(beat))
                beats = self._all("beat")
            except RuntimeError:
                if seen.get(0, ("", 0))[0] != _DONE:
                    self._gone(0)
                return
            self._unanswered = 0
            for other, (last, same) in seen.items():
                seconds = same * BEAT_SECONDS
                seen[other] = (beats[other], same + 1 if beats[other] == last else 0)
                if last.startswith(_SAID) or (last.startswith(_FAILED) and seconds > 2 * GRACE_SECONDS):
                    self._leave()
                elif last.isdigit() and seconds > SILENCE_SECONDS:
                    self._gone(other)

    def _watch_the_store(self) -> None:
        """End this process if the store stops answering.

        A stopped process that holds the store neither answers nor closes the connection.
        """
        while not self._stop.wait(BEAT_SECONDS):
            self._unanswered += 1
            if self._unanswered * BEAT_SECONDS > SILENCE_SECONDS + 2 * BEAT_SECONDS:
                self._gone(0)

    def _gone(self, other: int) -> None:
        """Name the lost process and end this one at once."""
        if not self._stop.is_set():
            print(
                f"nnssl_ext: error: process {other} of {self.count} ({self._who[other]}) is gone; process "
                f"{self.number} ends too. The last checkpoint is intact: go on with --c",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _leave(self) -> None:
        """End this process at once."""
        if not self._stop.is_set():
            with suppress(RuntimeError):
                self._store.set(f"beat{self.number}", _SAID)
            os._exit(1)


def _final(beat: str) -> bool:
    """Return whether a process has ended. A failed one may still ask which process reports the error."""
    return beat.startswith((_DONE, _SAID))


def _of_the_backend(error: BaseException) -> bool:
    """Return whether an error probably means a lost process."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
