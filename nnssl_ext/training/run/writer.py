"""Write checkpoints in the background, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.training.run.folder import FINAL, LATEST, keep_previous


class CheckpointWriter:
    """Write checkpoints from a copy.

    A context manager around a training: leaving it waits for the write.

    Args:
        background: False writes before ``write`` returns, and copies nothing.
        go_on: A checkpoint that cannot be written is told, and no error; the final one always is one.
        tell: Called with a line about it.
    """

    def __init__(self, background: bool, go_on: bool, tell: Callable[[str], None]) -> None:
        self.background, self.go_on, self.tell = background, go_on, tell
        self._thread: threading.Thread | None = None
        self._failures: list[tuple[Path, BaseException]] = []
        self._written = True

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            # what ended the training is the line to end with
            self.tell(f"WARNING: {failure.line}")

    def write(self, content: Mapping[str, Any], *paths: Path) -> None:
        """Write the same content to each path.

        It waits for the write before.

        Args:
            content: As for ``checkpoint.save``. It may change as soon as this returns.
            paths: Where to; checkpoint_final.pth is there when this returns.

        Raises:
            UserError: If an earlier checkpoint could not be written, or this one where it is waited for.
        """
        self.wait()
        self._written = True
        if not self.background:
            self._write(content, paths)
            self.wait()
            return
        copy = checkpoint.plain(content, copy=True)
        self._thread = threading.Thread(target=self._write, args=(copy, paths), name="checkpoint")
        self._thread.start()
        if FINAL in [path.name for path in paths]:
            self.wait()  # nnU-Net removes checkpoint_latest.pth next

    def wait(self) -> bool:
        """Wait for the last write. Return whether it succeeded.

        Raises:
            UserError: If it could not be, unless the training is to go on.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failures, self._failures = self._failures, []
        for path, error in failures:
            self._written = False
            if not isinstance(error, UserError) or not self.go_on or path.name == FINAL:
                raise error
            self.tell(f"WARNING: {error.line}. Going on (on_write_failure=go_on)")
        return self._written

    def _write(self, content: Mapping[str, Any], paths: tuple[Path, ...]) -> None:
        for path in paths:
            try:
                checkpoint.save(content, path, keep_previous if path.name == LATEST else None)
            except BaseException as error:  # it is raised again where the training waits
                self._failures.append((path, error))
                if not self.go_on or not isinstance(error, UserError):
                    return
