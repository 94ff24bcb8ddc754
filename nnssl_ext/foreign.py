"""Read foreign files safely: nothing in them is executed."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from torch import Tensor

from nnssl_ext.errors import RefusedError
from nnssl_ext.recipe import nested

_SCALAR = np.float64(0).__reduce__()[0]  # numpy's own constructor, wherever it lives
#: nnU-Net's checkpoints keep their log in numpy scalars. These names, and no others, may be loaded beside tensors.
NUMPY_SCALARS: list[Any] = [
    np.dtype,
    np.float32,
    np.float64,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name before numpy 2
    *(type(np.dtype(kind)) for kind in ("bool", "float16", "float32", "float64", "int32", "int64")),
]
#: Largest ratio of the content of an .npz or tar file to the file.
LARGEST_RATIO = 1000
#: A frame of Blosc2 begins with this, at this offset; its header's length stands behind.
_FRAME, _FRAME_AT, _LENGTH_AT = b"b2frame\0", 2, 11
#: Kinds of Blosc2 objects that run code or open other files when they are opened.
_ACTIVE = (b"LazyArray", b"proxy-source", b"\xa3b2o")


def load_tensors(path: Path, safe: list[Any] = NUMPY_SCALARS) -> Any:
    """Load tensors and plain values onto the CPU.

    Raises:
        RefusedError: If it claims to hold more than it stores.
        Exception: Of many kinds, for damaged files.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch never compresses: what does is a bomb
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise RefusedError("its parts are larger than the file")
    with torch.serialization.safe_globals(safe):
        content = torch.load(path, map_location="cpu", weights_only=True)
    check_tensors(content)
    return content


def check_tensors(content: Any) -> None:
    """Check every value of a loaded file.

    Raises:
        RefusedError: For a tensor that is not dense or is larger than its storage, and for too deep nesting.
    """
    for value in nested(content, "it is nested too deeply"):
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise RefusedError("it holds a tensor that is not dense")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise RefusedError("it holds a tensor that shows more than it stores")


def open_blosc2(path: Path, **options: Any) -> blosc2.NDArray:
    """Open a .b2nd array. Objects that run code are refused.

    Raises:
        RefusedError: For such a file, and for one without an array.
        Exception: Of many kinds, for damaged files.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH_AT + 4)
        length = int.from_bytes(start[_LENGTH_AT:], "big")
        if start[_FRAME_AT : _FRAME_AT + len(_FRAME)] != _FRAME or length > path.stat().st_size:
            raise RefusedError("it is no Blosc2 frame")
        header = start + file.read(length - len(start))
    found = [name.strip(b"\xa3").decode() for name in _ACTIVE if name in header]
    if found:
        raise RefusedError(f"it is a {found[0]}, which can run code; an array was expected")
    array = blosc2.open(urlpath=str(path), mode="r", **options)
    if not isinstance(array, blosc2.NDArray):
        raise RefusedError(f"it holds a {type(array).__name__}, expected an array")
    return array


def load_npz(path: Path, name: str) -> np.ndarray:
    """Load one array of an .npz file.

    Raises:
        RefusedError: If it would unpack to far more than its file.
        Exception: Of many kinds, for damaged files.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST_RATIO * path.stat().st_size:
        raise RefusedError(f"it would unpack to {size:,} bytes")
    with np.load(path, allow_pickle=False) as archive:
        return archive[name]


def unpack_tar(
    path: Path, target: Path, wanted: Callable[[tarfile.TarFile], Iterable[tarfile.TarInfo]] | None = None
) -> None:
    """Unpack a tar file within ``target``.

    Args:
        path: The file.
        target: A folder.
        wanted: Chooses members; None takes all.

    Raises:
        RefusedError: If it would unpack to far more than its file, which no medical images do.
        tarfile.TarError, OSError: If it cannot be unpacked.
    """
    limit, total = LARGEST_RATIO * path.stat().st_size, 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            if total > limit:
                raise RefusedError(f"it would unpack to more than {limit:,} bytes")
        # the data filter refuses members that would leave the folder
        archive.extractall(target, members=wanted(archive) if wanted else None, filter="data")


def nifti_problem(path: Path, quick: bool = False) -> str:
    """Describe what a NIfTI file (.nii, .nii.gz) lacks, '' if it is whole or another kind of file.

    ITK, and with it nnU-Net, reads missing or damaged image data as zeros without a word.

    Args:
        path: The file.
        quick: Look at the size only, which finds files that are cut short. Otherwise gzip's checksum is verified.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return ""
    import nibabel

    try:
        data = nibabel.load(path).dataobj  # type: ignore[attr-defined]
        wanted = int(data.offset) + math.prod(data.shape) * data.dtype.itemsize
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                found = path.stat().st_size
            else:
                file.seek(-4, os.SEEK_END)  # gzip's note of the size, modulo 2^32
                if quick and int.from_bytes(file.read(), "little") == wanted % 2**32:
                    return ""
                file.seek(0)  # cut, or of several members
                with gzip.GzipFile(fileobj=file) as stream:
                    found = sum(map(len, iter(lambda: stream.read(2**20), b"")))
    except Exception as error:  # damaged files raise anything
        return f"cannot be read ({' '.join(str(error).split())})"
    return "" if found >= wanted else f"is cut short: it holds {found:,} of {wanted:,} bytes"
