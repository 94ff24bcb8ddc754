"""Several processes watch each other: when one is gone, the others name it and end, instead of waiting for it.

A thread in each process raises a counter in a store of its own every few seconds and looks at the others' counters.
It does not depend on the backend, which may wait for minutes or for ever.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from nnssl_ext.training.distributed import rank, world

BEAT_SECONDS, SILENCE_SECONDS = 2.0, 30.0
_DONE = -1


class Heartbeat:
    """A context manager around a training; does nothing where there is one process."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.TCPStore | None = None

    def __repr__(self) -> str:
        return f"Heartbeat({'on' if self._thread else 'off'})"

    def __enter__(self) -> Heartbeat:
        if world() > 1:
            self._store = _own_store()
            self._store.set(f"who{rank()}", f"pid {os.getpid()} on {socket.gethostname()}")
            self._store.set(f"beat{rank()}", "0")
            dist.barrier()
            self._thread = threading.Thread(target=self._watch, args=(self._store,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is None or self._store is None:
            return
        if isinstance(error, RuntimeError):
            # most often the backend's word for a process that is gone: the thread ends us, with a better one
            self._thread.join(2 * SILENCE_SECONDS)
        self._stop.set()
        self._thread.join()
        self._store.set(f"beat{rank()}", str(_DONE))
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            dist.barrier()  # the first process keeps the store until nobody looks at it any more

    def _watch(self, store: dist.TCPStore) -> None:
        seen = {other: ("", time.monotonic()) for other in range(world()) if other != rank()}
        who = {other: store.get(f"who{other}").decode() for other in seen}
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                store.set(f"beat{rank()}", str(beat))
                for other, (last, since) in seen.items():
                    now = store.get(f"beat{other}").decode()
                    if now != last:
                        seen[other] = (now, time.monotonic())
                    elif now != str(_DONE) and time.monotonic() - since > SILENCE_SECONDS:
                        _end(other, who[other])
            except RuntimeError:
                if not self._stop.is_set():
                    _end(0, who.get(0, "it holds the store"))


def _own_store() -> dist.TCPStore:
    """A store that nothing else waits in; the first process holds it."""
    address = os.environ.get("MASTER_ADDR", "localhost")
    patience = timedelta(seconds=SILENCE_SECONDS)
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience) if rank() == 0 else None
    port = [store.port if store is not None else 0]
    dist.broadcast_object_list(port)
    return store or dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=patience)


def _end(other: int, who: str) -> None:
    """Say who is gone, and end this process whatever it waits for."""
    print(
        f"nnssl_ext: error: process {other} of {world()} ({who}) is gone; process {rank()} ends too. "
        f"The last checkpoint is intact: go on with --c",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
