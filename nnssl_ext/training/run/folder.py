"""Manage a run's folder: one process at a time, and the newest readable checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.files import acquire

FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
LATEST, PREVIOUS = "checkpoint_latest.pth", "checkpoint_previous.pth"
#: Checkpoints that ``--c`` may continue from, the newest first.
CHAIN = (FINAL, LATEST, PREVIOUS, BEST)
#: Weights that a fine-tuning keeps after chosen steps.
SNAPSHOTS = "checkpoint_step_*.pth"
LOCK, HOLDER = ".nnssl_ext.lock", ".nnssl_ext.holder.json"


class RunFolder:
    """The folder of one run. It need not exist. ``log`` is called with a line about anything unusual."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log

    def checkpoints(self) -> list[str]:
        """Return the names of checkpoints to continue from, the newest first."""
        return [name for name in CHAIN if (self.path / name).is_file()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process. The system releases the lock when the process ends.

        Raises:
            UserError: If another process works there; the message names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / LOCK), self.path / HOLDER
        try:
            locked = acquire(lock)
        except Timeout as error:
            raise UserError(
                f"{self.path} belongs to another run, {_described(holder)}. Wait for it or stop it. If it has ended "
                f"with its machine, delete {LOCK} there"
            ) from error
        except OSError as error:
            raise UserError(f"cannot lock {self.path}: {error.strerror or error}") from error
        if not locked:
            self.log("WARNING: this file system has no locks: a second run in this folder would not be noticed")
        try:
            with suppress(OSError):  # the lock holds without its label
                label = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                holder.write_text(json.dumps(label), encoding="utf-8")
            self._remove_unfinished()
            yield
        finally:
            # a finished run leaves the folder as stock does; these two files of a killed run stop no other run
            with suppress(OSError):
                holder.unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def _remove_unfinished(self) -> None:
        """Delete temporary files of killed processes."""
        for path in self.path.glob(".checkpoint_*.tmp"):
            path.unlink(missing_ok=True)

    def set_aside(self, *sources: Path | str | None) -> None:
        """Move an earlier run's checkpoints, summary and validations into a subfolder.

        Raises:
            UserError: If a source, which the run is going to read, would be moved.
        """
        found = [self.path / name for name in self.checkpoints()] + sorted(self.path.glob(SNAPSHOTS))
        if not found:
            return
        moved = [path.resolve() for path in (self.path, *found)]
        for source in (given for given in sources if given):
            path = Path(source).expanduser().resolve()
            # a file system may ignore case; a hard link in another folder stays
            if path.exists() and any(_same(path, other) for other in moved):
                raise UserError(
                    f"expected weights of another run to start from, got {source}, which this run would replace. "
                    f"Continue it with --c, or copy the weights to another folder"
                )
        target = self.path / f"earlier_{time.strftime('%Y%m%d_%H%M%S')}"
        target.mkdir()
        reports = [self.path / "pretraining_summary.json", *self.path.glob("validation*")]  # they describe these
        for path in [*found, *(path for path in reports if path.exists())]:
            os.replace(path, target / path.name)
        names = ", ".join(path.name for path in found)
        self.log(f"Starting anew (without --c); the checkpoints of an earlier run are kept in {target}: {names}")

    def remove_previous(self) -> None:
        """Delete checkpoint_previous.pth once the final one is there."""
        if (self.path / FINAL).is_file():
            (self.path / PREVIOUS).unlink(missing_ok=True)

    def reopen(self) -> None:
        """Make room for a longer run: the final checkpoint of the shorter one is an earlier one now."""
        final, latest = self.path / FINAL, self.path / LATEST
        if final.is_file():
            os.replace(final, self.path / PREVIOUS if latest.is_file() else latest)

    def load_newest(self, file: Path) -> tuple[dict[str, Any], str]:
        """Load a checkpoint, or the newest intact one before it.

        Returns:
            The content, and the path it is from.

        Raises:
            UserError: If none can be read. Nothing is deleted or written.
        """
        problems = []
        after = CHAIN.index(file.name) + 1 if file.name in CHAIN else 1
        chain = [file, *(file.parent / name for name in CHAIN[after:])]
        latest = file.parent / LATEST
        if file.name == FINAL and latest.is_file() and latest.stat().st_mtime > file.stat().st_mtime:
            # of a longer run that went on from the final one
            chain = [latest, file, *(path for path in chain[1:] if path != latest)]
        if file.name == BEST and self.checkpoints()[:1] == [PREVIOUS]:
            # stock does not look for the previous one, which may be newer
            chain = sorted([file, file.parent / PREVIOUS], key=lambda path: path.stat().st_mtime, reverse=True)
        for path in chain:
            if path != file and not path.is_file():
                continue
            try:
                content = checkpoint.load(path)
            except UserError as error:
                problems.append(error.line)
                self.log(f"WARNING: {error.line}")
                continue
            if problems:
                self.log(f"WARNING: going on from the one before it, {path}: the steps since then are done again")
            return content, str(path)
        raise UserError(
            f"{'; '.join(problems)}. None can be read, and nothing was deleted. Restore one, or start anew without --c"
        )


def keep_previous(latest: Path) -> None:
    """Give checkpoint_latest.pth the second name checkpoint_previous.pth."""
    folder, previous = latest.parent, latest.parent / PREVIOUS
    if not latest.is_file():
        return
    temporary = folder / f".{PREVIOUS}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(latest, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(latest, temporary)
    os.replace(temporary, previous)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other) and os.path.samefile(one.parent, other.parent)


def _described(holder: Path) -> str:
    try:
        label = json.loads(holder.read_text(encoding="utf-8")[:1000])
        return f"process {int(label['pid'])} on {label['host']!r} since {label['since']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that left no name"
