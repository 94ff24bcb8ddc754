"""Give a part of the GPU check its device, its time and its results."""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_turns

#: Mark of a row that was begun and not finished.
UNFINISHED = "unfinished"
#: Seconds that processes get to end by themselves.
GRACE = 5


class NoTimeLeftError(Exception):
    """End a part early, since a row needs more time than is left."""


class DeviceLostError(Exception):
    """End this process, since no later call on the device can succeed."""


def device_is_lost(kind: str) -> bool:
    """Return whether an error has spoilt the device for this process, as an illegal access does."""
    try:
        if kind == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


@dataclass(frozen=True)
class Context:
    """Device, time and results of one part.

    Attributes:
        part: Name of the part.
        output: Folder of results and logs.
        scratch: Folder for data sets; removed at the end.
        kind: ``cuda`` or ``cpu``.
        tiny: Whether this is a rehearsal.
        deadline: Value of ``time.monotonic`` at which the part is stopped.
        study: Folder with a study to continue.
    """

    part: str
    output: Path
    scratch: Path
    kind: str
    tiny: bool
    deadline: float
    study: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device to measure."""
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.monotonic()

    def read(self) -> dict[str, Any]:
        """Return the rows so far."""
        file = self._file
        return json.loads(file.read_text()) if file.is_file() else {}

    def has(self, name: str) -> bool:
        """Return whether a row is there, from a process whose device was lost."""
        return name in self.read()

    def put(self, name: str, value: Any) -> None:
        """Write one row."""
        rows = {**self.read(), name: value}
        waiting = self._file.with_suffix(".new")
        waiting.write_text(json.dumps(rows, indent=1))
        waiting.replace(self._file)

    @contextmanager
    def row(self, name: str, seconds: float = 0) -> Iterator[dict[str, Any]]:
        """Fill one row. An exception is recorded in it and goes no further.

        Args:
            name: Name of the row.
            seconds: Time that it needs.

        Raises:
            NoTimeLeftError: If less time is left. The row says so, and the part ends.
            DeviceLostError: If the row has spoilt the device. The part goes on in another process.
        """
        row: dict[str, Any] = {}
        begin = time.monotonic()
        print(f"--- {name}, {self.left:.0f} s left", flush=True)
        if self.left < seconds:
            self.put(name, {"left out": f"It needs {seconds} s, {self.left:.0f} s were left."})
            raise NoTimeLeftError(name)
        self.put(name, {UNFINISHED: True})  # if the part is stopped within it
        try:
            yield row
        except NoTimeLeftError:
            raise
        except Exception:  # what fails is a result
            row["failed"] = traceback.format_exc()
            print(row["failed"], flush=True)
        row["took"] = round(time.monotonic() - begin, 2)
        self.put(name, row)
        if "failed" in row and device_is_lost(self.kind):
            raise DeviceLostError(name)

    def folder(self, name: str) -> Path:
        """Make a folder for one nnU-Net environment."""
        (self.scratch / self.part).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.scratch / self.part, prefix=f"{name} "))

    @property
    def _file(self) -> Path:
        return self.output / f"{self.part}.json"


def end_group(pid: int) -> None:
    """Ask a process group to end, and kill it after ``GRACE`` seconds. torchrun ends its workers if it is asked."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0)):
        end = time.monotonic() + seconds
        try:
            os.killpg(pid, number)
            while time.monotonic() < end:
                os.killpg(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def milliseconds(context: Context, function: Any, repeats: int, warm_up: int = 2) -> float:
    """Return the median time of a call, the device's work included."""
    costs = in_turns({"": function}, repeats, warm_up=warm_up, device=context.device)[""]
    return 1000 * statistics.median(cost.wall for cost in costs)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
