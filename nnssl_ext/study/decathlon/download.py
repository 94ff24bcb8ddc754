"""Download a large file with resumption and a checksum."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from nnssl_ext.errors import UserError
from nnssl_ext.files import file_digest

#: Attempts in a row without a single new byte before it is given up, and seconds between two.
ATTEMPTS, PAUSE_SECONDS = 5, 2.0
TIMEOUT_SECONDS = 60
BLOCK = 1 << 20


def download(url: str, path: Path, md5: str, pause: float = PAUSE_SECONDS) -> None:
    """Download ``url`` to ``path``. An earlier ``path.part`` is continued.

    Args:
        url: http or https.
        path: Of the file; nothing happens if it is there with this checksum.
        md5: The checksum that it must have.
        pause: Seconds before a cut connection is tried again.

    Raises:
        UserError: If the server does not have it, the connection stays cut, or the checksum is wrong.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"--url {url} cannot be used. Give an address that starts with https://")
    if path.is_file() and file_digest(path, "md5") == md5:
        return
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    left = ATTEMPTS
    while True:
        before = _size(part)
        failure = _attempt(url, part)
        if not failure:
            break
        left = ATTEMPTS if _size(part) > before else left - 1
        if not left:
            raise UserError(f"{url}: {failure}; {_size(part)} bytes are kept in {part}, call again to go on")
        time.sleep(pause)
    found = file_digest(part, "md5")
    if found != md5:
        part.unlink()
        raise UserError(
            f"{url} gave a file with md5 {found}, expected {md5}. It was removed, try again or another --url"
        )
    part.replace(path)


def _attempt(url: str, part: Path) -> str:
    """Download over one connection. Return the error, '' when done."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if have and not _continues(response, have):
                have = 0  # the server knows no ranges: from the beginning
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            _check_space(part, (total or 0) - have)
            with part.open("ab" if have else "wb") as file:
                _copy(response, file, have, total)
        if total is not None and _size(part) < total:
            return f"the connection was cut after {_size(part)} of {total} bytes"
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the checksum decides
            return ""
        if error.code < 500:
            raise UserError(f"{url}: the server answered {error.code} {error.reason}") from error
        return f"the server answered {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _continues(response: Any, have: int) -> bool:
    return response.status == 206 and str(response.headers.get("Content-Range", "")).startswith(f"bytes {have}-")


def _copy(response: Any, file: IO[bytes], have: int, total: int | None) -> None:
    name = os.path.basename(file.name).removesuffix(".part")
    bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with bar:
        while block := response.read1(BLOCK):
            file.write(block)
            bar.update(len(block))


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise UserError(f"{part.parent} has {free} bytes left, {needed} are needed. Make room or name another -o")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
