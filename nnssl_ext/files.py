"""Writing files so that nobody ever sees half of one, and one process at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnssl_ext.errors import UserError


@contextmanager
def replaced_on_success(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that takes ``path``'s place when the block ends without an exception.

    It is flushed to the disk before it does; otherwise it is removed and ``path`` is left as it was.

    Raises:
        OSError: If the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private, ordinary ones are not
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        result = hashlib.sha256()
        while block := file.read(2**20):
            result.update(block)
    return result.hexdigest()


def lock_file(path: Path, work: str) -> FileLock:
    """A lock, released when this process ends, however it ends; ``work`` says on what, for the message.

    Raises:
        UserError: If another process has it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process works on {work}; wait for it or stop it") from error
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
