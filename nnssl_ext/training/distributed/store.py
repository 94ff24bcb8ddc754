"""Share a store between the processes of a run.

Messages reach the others even while the backend waits in a collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world

T = TypeVar("T")
#: How long an answer of the store may take, and how long the processes may take to come together.
ANSWER, MEETING = timedelta(seconds=30), timedelta(minutes=10)
_POLL_SECONDS = 0.5
_store: dist.Store | None = None


def shared_store() -> dist.Store:
    """Return this process's connection to the store.

    The first call, made by all processes together, opens the store.
    """
    global _store  # one connection for the life of the process
    if _store is None:
        _store = _opened_by_the_first()
    return _store


def meet(number: int, world: int) -> dist.Store:
    """Meet the other processes and return the group's store.

    The place is MASTER_ADDR and MASTER_PORT.

    Afterwards ``shared_store`` is another connection to the same place: nothing that the backend waits for blocks it.

    Raises:
        UserError: If the place cannot be reached.
    """
    global _store
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, _, _ = next(dist.rendezvous("env://", number, world, timeout=MEETING))
        own = dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=ANSWER)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {number} of {world} did not meet the others at {address}:{port} ({error}). It needs "
            f"MASTER_ADDR and MASTER_PORT of the first machine, reachable from all, and all processes started"
        ) from error
    # an elastic agent's store outlives a restart of its processes
    _store = dist.PrefixStore(f"nnssl_ext/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", own)
    return store


def from_the_first(key: str, make: Callable[[], T]) -> T:
    """Send a result of the first process to all. A collective would time out after minutes."""
    if world() == 1:
        return make()
    made: list[Any] = [None]
    if rank() == 0:
        made = [make()]
        shared_store().set(key, "made")
    while not shared_store().check([key]):
        time.sleep(_POLL_SECONDS)
    dist.broadcast_object_list(made)
    return made[0]


def _opened_by_the_first() -> dist.Store:
    address = os.environ.get("MASTER_ADDR", "localhost")
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=ANSWER) if rank() == 0 else None
    port = [store.port if store is not None else 0]
    dist.broadcast_object_list(port)
    return store or dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=ANSWER)
