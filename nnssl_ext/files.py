"""Write files atomically and lock them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnssl_ext.errors import UserError

# read once: between the two calls, files of other threads would be open to all
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replaced_on_success(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` on success.

    It lies in the same folder and is flushed to the disk first. After an exception, ``path`` is left as it was.

    Raises:
        OSError: If the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes writable files only
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp's files are private, ordinary ones are not
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    for seconds in (0.1, 0.3, 1):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(seconds)  # Windows refuses while a virus scanner or a spreadsheet has the file open
    os.replace(temporary, path)


def link(path: Path, target: Path) -> None:
    """Make ``path`` a link to a file or folder.

    A link to somewhere else is replaced; what else exists stays. Windows gives symbolic links to administrators only,
    and some file systems have none. There a file is copied, and on Windows a folder becomes a junction.

    Raises:
        OSError: If the folder cannot be written.
    """
    target = target.resolve()
    if path.is_symlink() and path.resolve() != target:  # to something that is gone, or was moved
        path.unlink()
    if path.exists():
        return
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        if not target.is_dir():
            shutil.copyfile(target, path)
        elif os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(target), str(path))  # type: ignore[attr-defined]
        else:
            raise


def file_digest(path: Path, name: str = "sha256") -> str:
    """Return the sha256, or another hash, of a file's bytes.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        result = hashlib.new(name, usedforsecurity=False)
        while block := file.read(2**20):
            result.update(block)
    return result.hexdigest()


def acquire(lock: FileLock) -> bool:
    """Take a lock at once. Return False where the file system has no locks.

    Raises:
        Timeout: If another process holds it.
        OSError: If the lock file cannot be written.
    """
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # older versions of filelock
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        return False
    return True


def lock_file(path: Path, work: str) -> AbstractContextManager[Any]:
    """Take a lock that ends with this process. Where the file system has none, go on without.

    Args:
        path: Lock file. Its folder is made.
        work: Object of the lock, for the message.

    Raises:
        UserError: If another process holds it, or the folder cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locked = acquire(lock)
    except Timeout as error:
        raise UserError(f"another process works on {work}. Wait for it or stop it") from error
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written for {work}, got {path.parent}: {error.strerror}. Give another one, "
            f"or permission to write"
        ) from error
    return lock if locked else nullcontext()


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be written.

    It need not exist yet. Nothing is left behind.

    Args:
        folder: The folder.
        name: Variable that names it, for the message.

    Raises:
        UserError: If it, or the nearest folder above that exists, cannot be written.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(20, "is not a folder", str(nearest))
        handle, temporary = tempfile.mkstemp(dir=nearest, prefix=".nnssl_ext_")
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise UserError(f"{name}={folder} cannot be written: {nearest}: {error.strerror}") from error
