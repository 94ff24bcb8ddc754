"""Workers that are killed or hang: named, replaced, and no batch lost or another."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from nnssl_ext.data import loader as steady
from nnssl_ext.data.crops import Crop, CropBatch, CropDataset, CropRequest, Sample
from nnssl_ext.data.loader import Failure, Shard, SteadyLoader
from nnssl_ext.errors import UserError
from nnssl_ext.views.multicrop import ViewKind
from nnssl_ext.views.spatial import SpatialRange
from tests.support.cases import dataset
from tests.support.runs import fault

#: Processes and random files: seconds each.
pytestmark = pytest.mark.integration


def loader(
    data: CropDataset, told: list[str], workers: int = 2, waiting: Callable[[], None] = lambda: None
) -> SteadyLoader:
    return SteadyLoader(data, Shard(2, 10, 2), workers=workers, pin_memory=False, log=told.append, waiting=waiting)


STILL = SpatialRange((1.0, 1.0, 1.0))


def same(first: list[CropBatch], second: list[CropBatch]) -> bool:
    return [b.indices for b in first] == [b.indices for b in second] and all(
        np.array_equal(x.data, y.data)
        for a, b in zip(first, second, strict=True)
        for row, other in zip(a.boxes, b.boxes, strict=True)
        for x, y in zip(row, other, strict=True)
    )


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(steady, "POLL_SECONDS", 2)
    original = _MultiProcessingDataLoaderIter._next_data
    struck: list[int] = []

    def next_data(self: Any) -> Any:
        if not struck and self._rcvd_idx == 1:
            struck.append(self._workers[0].pid)
            os.kill(self._workers[0].pid, signal.SIGKILL)
            raise error
        return original(self)

    told: list[str] = []
    expected = list(loader(dataset(folder), told, workers=0))
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", next_data)
    assert same(list(loader(dataset(folder), told)), expected)
    (line,) = told
    assert f"worker {struck[0]} was killed by signal 9" in line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_lost_worker_is_named_and_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(steady, "POLL_SECONDS", 2)
    monkeypatch.setattr(steady, "HANG_SECONDS", 5)
    told: list[str] = []
    data = dataset(folder)
    expected = list(loader(data, told, workers=0))
    fault(monkeypatch, tmp_path / "flag", 9, number)
    begin = time.monotonic()
    assert same(list(loader(data, told)), expected)
    assert time.monotonic() - begin < 30
    (line,) = told
    own, other = data.draw_cases(9)
    assert f"while reading sample 9 ({own}, {other})" in line
    assert ("gave no batch for" in line) == (number == signal.SIGSTOP)
    if number == signal.SIGKILL:
        assert "was killed by signal 9" in line
    assert not steady.multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_before_its_batch_was_fetched_is_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A batch is fetched from the worker that made it, which must answer."""
    monkeypatch.setattr(steady, "POLL_SECONDS", 2)
    monkeypatch.setattr(steady, "HANG_SECONDS", 5)
    flag, told = tmp_path / "flag", list[str]()
    data = dataset(folder)
    expected = list(loader(data, told, workers=0))
    original = _MultiProcessingDataLoaderIter._next_data

    def next_data(self: Any) -> Any:
        while not flag.exists():
            time.sleep(0.05)
        time.sleep(0.2)
        return original(self)

    fault(monkeypatch, flag, 9, number, after=0.5)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", next_data)
    assert same(list(loader(data, told)), expected)
    (line,) = told
    assert "while reading sample 9 (" in line
    assert ("gave no batch for" in line) == (number == signal.SIGSTOP)
    assert not steady.multiprocessing.active_children()


def test_a_case_that_kills_every_worker_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "POLL_SECONDS", 1)
    fault(monkeypatch, tmp_path / "flag", 4, signal.SIGKILL, once=False)
    told: list[str] = []
    with pytest.raises(
        UserError, match=r"loader: worker \d+ was killed by signal 9 while reading sample 4 \(c\d, c\d\)"
    ):
        list(loader(dataset(folder), told, workers=1))
    assert len(told) == steady.REPLACEMENTS


def test_who_waits_may_be_called_away(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while there is no batch is heard within seconds."""
    monkeypatch.setattr(steady, "POLL_SECONDS", 1)
    fault(monkeypatch, tmp_path / "flag", 4, signal.SIGSTOP)

    def called_away() -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        list(loader(dataset(folder), [], workers=1, waiting=called_away))


def test_an_error_that_comes_late_is_no_end_of_a_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, torch would give the next batch in its place."""
    monkeypatch.setattr(steady, "POLL_SECONDS", 1.2)

    def next_data(self: Any) -> Any:
        time.sleep(0.5)
        raise RuntimeError("Caught AcceleratorError in pin memory thread for device 0.")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", next_data)
    with pytest.raises(RuntimeError, match="pin memory thread"):
        list(loader(dataset(folder), []))


class Broken(CropDataset):
    """One sample whose file is gone."""

    error: type[Exception]

    def __getitem__(self, sample: int) -> Sample:
        if sample == 5:
            raise self.error("case_03.pkl")
        return super().__getitem__(sample)


@pytest.mark.parametrize("error", [FileNotFoundError, EOFError, ConnectionResetError, ValueError])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_within_a_worker_is_raised_at_once(folder: Path, error: type[Exception], workers: int) -> None:
    """The worker lives; asked again, torch would give the next batch."""
    plain = dataset(folder)
    broken = Broken(plain.index, plain.cases, plain.request, plain.seed)
    broken.error = error
    begin = time.monotonic()
    with pytest.raises(error, match=r"case_03\.pkl"):
        list(loader(broken, [], workers=workers))
    assert time.monotonic() - begin < steady.POLL_SECONDS


def test_a_failure_ends_the_run_in_one_line(folder: Path) -> None:
    failing = loader(dataset(folder), [], workers=1)
    failing.join = lambda samples: Failure("case 'x' is gone") if samples[0].number == 6 else samples[0].number
    batches = iter(failing)
    assert next(batches) == 4
    with pytest.raises(UserError, match="case 'x' is gone"):
        next(batches)


def test_many_boxes_need_no_higher_limit_of_open_files(folder: Path) -> None:
    """Linux allows 1,024 by default, fewer than the boxes of one batch of 3DINO."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    plain = dataset(folder)
    many = replace(plain, request=CropRequest((Crop((4, 4, 4), STILL),) * 100))
    batches = SteadyLoader(many, Shard(0, 2, 8), workers=1, pin_memory=False, log=lambda _: None, waiting=lambda: None)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, before[1]), before[1]))
        assert [len(batch.boxes) for batch in batches] == [100, 100]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Slow(CropDataset):
    """Samples that take longer together than a worker may be silent, but each of which is progress."""

    def __getitem__(self, sample: int) -> Sample:
        time.sleep(1.0)
        return super().__getitem__(sample)


def test_a_slow_batch_is_no_hang_while_samples_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "POLL_SECONDS", 1)
    monkeypatch.setattr(steady, "HANG_SECONDS", 3)
    plain, told = dataset(folder), list[str]()
    slow = Slow(plain.index, plain.cases, plain.request, plain.seed)
    begin = time.monotonic()
    shard = Shard(0, 1, 6)
    (batch,) = SteadyLoader(slow, shard, workers=1, pin_memory=False, log=told.append, waiting=lambda: None)
    assert time.monotonic() - begin > 5
    assert told == []
    assert batch.indices == list(range(6))


def test_prefetching_is_limited_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**60))
    monkeypatch.setattr(steady, "PREFETCHED_BYTES", 1000)
    assert steady.prefetching(1, 4) == (4, 3)
    assert steady.prefetching(100, 4) == (4, 2)
    assert steady.prefetching(300, 4) == (3, 1)
    assert steady.prefetching(10**6, 4) == (1, 1)
    assert steady.prefetching(100, 0) == (0, 0)
    monkeypatch.setattr(steady.shutil, "disk_usage", lambda _: SimpleNamespace(free=400))  # a small /dev/shm
    assert steady.prefetching(100, 4) == (2, 1)


def test_the_estimate_of_a_sample_is_near_what_is_read(folder: Path) -> None:
    data = dataset(folder)
    read = [sum(box.data.nbytes for box in data[sample].boxes) for sample in range(16)]
    assert max(read) / 2 <= data.sample_bytes() <= 4 * max(read)


def test_views_that_are_read_one_by_one_count_as_they_are(folder: Path) -> None:
    """The region that they lie in may be the whole case."""
    kinds = (
        ViewKind(2, (12, 12, 12), (0.3, 1.0), (0.3, 1.0), STILL),
        ViewKind(4, (6, 6, 6), (0.05, 0.3), (0.05, 0.3), STILL),
    )
    region = Crop((16, 16, 16), STILL, scale=100.0, views=kinds)
    data = replace(dataset(folder), request=CropRequest((region,)))
    read = [sum(box.data.nbytes for box in data[sample].boxes) for sample in range(16)]
    assert max(read) <= data.sample_bytes() <= 1.5 * max(read)


def test_ending_never_waits_for_torchs_own_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch joins its pinning thread without a limit (pytorch#21554)."""
    monkeypatch.setattr(steady, "END_SECONDS", 1)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", lambda _: threading.Event().wait())
    begin = time.monotonic()
    batches = iter(loader(dataset(folder), []))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 20
    deadline = time.monotonic() + 10
    while steady.multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_read_where_the_system_has_no_signal_of_their_deaths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no SIGCHLD."""
    monkeypatch.setattr(steady, "signal", SimpleNamespace())
    before = signal.getsignal(signal.SIGCHLD)
    try:
        assert len(list(loader(dataset(folder), [], workers=1))) == 8
    finally:
        signal.signal(signal.SIGCHLD, before)
