"""Worker processes that die, hang or fill the memory: one item costs one item."""

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nnssl_ext.data.corpus.pool import Lost, WorkerPool, _free_in_container, _limit_memory
from nnssl_ext.errors import UserError

#: Processes and random files: seconds each.
pytestmark = pytest.mark.integration


def work(item: Any) -> Any:
    """Do what an item says."""
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif item == "exit":
        os._exit(3)
    elif item == "hang":
        time.sleep(600)
    elif item == "fill":
        return len(bytearray(2**46))
    elif item == "slow":
        time.sleep(0.5)
    elif item == "fail":
        raise ValueError("not the item's fault")
    return item, os.getpid()


def seconds(item: Any) -> float:
    return 1.0 if item == "hang" else 60.0


@pytest.mark.parametrize("processes", [1, 3])
def test_an_item_that_ends_its_worker_costs_one_item(processes: int) -> None:
    items = ["slow", "crash", 1, "kill", 2, "hang", 3, "fill", 4, "exit", 5]
    results = list(WorkerPool(work, processes, seconds).run(items))
    lost = {item: result.reason for item, result in zip(items, results, strict=True) if isinstance(result, Lost)}
    assert lost == {
        "crash": "ended its reader (SIGSEGV)",
        "kill": "ended its reader (SIGKILL, most likely for want of memory)",
        "hang": "took more than 1 s to read",
        "fill": "needs more memory than there is",
        "exit": "ended its reader (status 3)",
    }
    assert [result[0] for result in results if not isinstance(result, Lost)] == ["slow", 1, 2, 3, 4, 5]


def test_a_worker_lives_as_long_as_its_items_let_it() -> None:
    results = list(WorkerPool(work, 1, seconds).run(list(range(20))))
    assert len({process for _, process in results}) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(results[0][1], 0)


def test_an_error_of_the_work_ends_the_iteration() -> None:
    with pytest.raises(ValueError, match="not the item's fault"):
        list(WorkerPool(work, 2, seconds).run([1, "fail", 2]))


def test_a_worker_that_cannot_start_is_no_items_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl_ext.data.corpus.pool._serve", os.abort)
    with pytest.raises(UserError, match="Expected a worker process, got one that ended with status"):
        list(WorkerPool(work, 1, seconds).run([1]))


def test_files_in_memory_are_free_memory(tmp_path: Path) -> None:
    """A container counts them as used, and gives them up for a program."""
    for name, text in (
        ("max", "1000\n"),
        ("current", "990\n"),
        ("stat", "anon 90\ninactive_file 500\nactive_file 300\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _free_in_container(tmp_path) == 1000 - 990 + 500 + 300


def memory_limit(_: Any) -> int:
    return resource.getrlimit(resource.RLIMIT_AS)[0]


def test_the_memory_limit_is_set_anew_for_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        limits = []
        for free in (2**40, 2**45):
            monkeypatch.setattr("nnssl_ext.data.corpus.pool._memory_limit", lambda free=free: free)
            _limit_memory(before[0])
            limits.append(memory_limit(None))
        assert limits == [2**40, 2**45]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
