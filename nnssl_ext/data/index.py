"""Index preprocessed cases, so that a start opens none.

The index holds the shape of each case, a coarse map of the body, and problems. A case is read once: when it is new or
its file has changed. The index lies beside the configuration's folder, because nnU-Net refuses unknown files in it.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from skimage.filters import threshold_li
from tqdm import tqdm

from nnssl_ext.data.cases import list_cases, open_case
from nnssl_ext.files import replaced_on_success
from nnssl_ext.networks.base import Triple, triple

#: Most bins of the body map per axis.
BINS = 16
#: Share of body voxels from which a bin is body.
BODY_SHARE = 0.25
#: Raised when stored values change their meaning.
VERSION = 2
#: Voxels that stand for a whole image.
SAMPLE = 100_000


@dataclass
class CaseRecord:
    """One case.

    Attributes:
        shape: (C, D, H, W).
        body: Body map, (bins, bins, bins) bool.
        problem: Empty if the case is usable.
    """

    shape: tuple[int, ...]
    body: np.ndarray
    problem: str = ""


class CaseIndex:
    """Hold the records of all cases in a folder. Make one with ``build``."""

    def __init__(self, folder: Path, cases: list[str], keys: np.ndarray, table: dict[str, Any]) -> None:
        self.folder = folder
        self.cases = cases
        self._keys = keys
        self._table = table
        self._row = {case: row for row, case in enumerate(cases)}
        #: Cases that a run excludes, and why.
        self.left_out: dict[str, str] = {}

    def __getitem__(self, case: str) -> CaseRecord:
        row = self._row[case]
        shape = tuple(int(n) for n in self._table["shape"][row])
        bits = np.unpackbits(self._table["body"][row], count=BINS**3).astype(bool).reshape((BINS,) * 3)
        used = tuple(min(BINS, edge) for edge in shape[1:])
        problem = self.left_out.get(case, str(self._table["problem"][row]))
        return CaseRecord(shape, bits[: used[0], : used[1], : used[2]], problem)

    def problems(self, channels: int | None = None) -> dict[str, str]:
        """Return unusable cases with their problems.

        Args:
            channels: Number that each case should have; None for any.
        """
        rows = np.flatnonzero(self._table["problem"] != "")
        others = {
            case: f"has {found} channels, the plans expect {channels}"
            for case, found in zip(self.cases, self.channels(), strict=True)
            if channels not in (None, found)
        }
        return others | {self.cases[row]: str(self._table["problem"][row]) for row in rows}

    def channels(self) -> np.ndarray:
        """Return each case's channels, 0 for unreadable ones."""
        return self._table["shape"][:, 0]

    def common_size(self) -> Triple:
        """Return the 10th percentile of edges per axis."""
        rows = [row for row, case in enumerate(self.cases) if case not in self.left_out]
        return triple(np.percentile(self._table["shape"][rows, 1:], 10, axis=0, method="lower").tolist())

    def largest_size(self) -> Triple:
        """Edges in voxels, per axis, of the largest case."""
        return triple(self._table["shape"][:, 1:].max(axis=0).tolist())

    def fingerprint(self) -> dict[str, str]:
        """Digest each case: shape, size and body map. '' for excluded cases."""
        rows = zip(self._table["shape"], self._keys[:, 0], self._table["body"], strict=True)
        digests = (crc32(body.tobytes(), crc32(f"{shape.tolist()} {size}".encode())) for shape, size, body in rows)
        return {
            case: "" if case in self.left_out else f"{digest:08x}"
            for case, digest in zip(self.cases, digests, strict=True)
        }

    @classmethod
    def build(
        cls,
        folder: Path,
        *,
        workers: int = 1,
        show_progress: bool = False,
        known: Mapping[str, CaseRecord] | None = None,
    ) -> CaseIndex:
        """Index a folder and read only changed cases.

        Args:
            folder: ``nnUNet_preprocessed/DatasetXXX_NAME/PLANS_CONFIGURATION``.
            workers: Threads that read.
            show_progress: Draw a progress bar when there is something to read.
            known: Records of cases that were just written; these are not read.
        """
        known = known or {}
        stats = list_cases(folder)
        cases = list(stats)
        keys = np.array(list(stats.values()), dtype=np.int64).reshape(-1, 2)
        del stats
        path = index_file(folder)
        table = _empty_table(len(cases))
        try:
            unknown = _take_over(path, cases, keys, table)
        except Exception:  # a damaged index raises anything; it is made anew
            table, unknown = _empty_table(len(cases)), list(range(len(cases)))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            records = pool.map(lambda row: known.get(cases[row]) or examine(folder, cases[row]), unknown)
            progress = tqdm(records, "Looking at new cases", len(unknown), disable=not show_progress or not unknown)
            for row, record in zip(unknown, progress, strict=True):
                body = np.zeros((BINS,) * 3, dtype=bool)
                body[tuple(slice(0, n) for n in record.body.shape)] = record.body
                table["shape"][row] = record.shape
                table["body"][row] = np.packbits(body)
                table["problem"][row] = record.problem
        index = cls(folder, cases, keys, table)
        if unknown:
            index._write(path)
        return index

    def _write(self, path: Path) -> None:
        try:
            with replaced_on_success(path) as temporary, temporary.open("wb") as file:
                stored: dict[str, Any] = {
                    **self._table,
                    "problem": self._table["problem"].astype(str),
                    "keys": self._keys,
                }
                np.savez(file, version=VERSION, cases=np.array(self.cases, dtype=str), **stored)
        except OSError as error:
            # a data folder may be read-only; the index is then made anew at every start
            warnings.warn(f"the case index {path} could not be kept: {error.strerror}", stacklevel=3)


def _empty_table(cases: int) -> dict[str, Any]:
    return {
        "shape": np.zeros((cases, 4), dtype=np.int64),
        "body": np.zeros((cases, BINS**3 // 8), dtype=np.uint8),
        "problem": np.full(cases, "", dtype=object),
    }


def _take_over(path: Path, cases: list[str], keys: np.ndarray, table: dict[str, Any]) -> list[int]:
    """Copy the rows of unchanged cases. Return the others."""
    with np.load(path, allow_pickle=False) as stored:
        if int(stored["version"]) != VERSION:
            return list(range(len(cases)))
        earlier = {name: stored[name] for name in ("cases", "keys", *table)}
    row_of = {case: row for row, case in enumerate(earlier["cases"].tolist())}
    old = np.array([row_of.get(case, -1) for case in cases], dtype=np.int64)
    # a case with a problem is looked at again: it may have been repaired in place
    usable = np.append(earlier["problem"] == "", False)  # row -1: not there
    same = (np.append(earlier["keys"], [[-1, -1]], axis=0)[old] == keys).all(axis=1) & usable[old]
    if same.all() and np.array_equal(old, np.arange(len(earlier["cases"]))):
        # nothing has changed, as at nearly every start: no second copy of a large corpus
        table.update({name: earlier[name] for name in table})
        return []
    for name in table:
        table[name][same] = earlier[name][old[same]]
    return np.flatnonzero(~same).tolist()


def examine(folder: Path, case: str) -> CaseRecord:
    """Read a whole case: shape, body map and problem."""
    nothing = CaseRecord((0, 0, 0, 0), np.zeros((0, 0, 0), dtype=bool))
    try:
        data = np.asarray(open_case(folder, case)[:])
    except Exception as error:  # blosc2 raises RuntimeError, ValueError or KeyError on damaged files
        nothing.problem = f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        return nothing
    return record_of(data)


def record_of(data: np.ndarray) -> CaseRecord:
    """Make the record of a case's data (C, D, H, W)."""
    if data.ndim != 4 or 0 in data.shape:
        problem = f"has shape {data.shape}, expected (channels, depth, height, width)"
        return CaseRecord((0, 0, 0, 0), np.zeros((0, 0, 0), dtype=bool), problem)
    record = CaseRecord(data.shape, np.zeros(tuple(min(BINS, n) for n in data.shape[1:]), dtype=bool))
    if not np.isfinite(data).all():
        record.problem = "holds NaN or infinite values"
    elif (data == data[:, :1, :1, :1]).all():
        record.problem = "is constant"
    else:
        record.body = body_map(data)
    return record


def body_map(data: np.ndarray) -> np.ndarray:
    """Map the body on a grid of bins.

    bool, at most ``BINS`` bins per axis, from the image alone.

    A voxel is body when its mean over channels exceeds Li's minimum cross-entropy threshold (Li and Tam 1998).
    """
    image = data.mean(0, dtype=np.float32)
    body = (image > threshold_li(sampled(image))).astype(np.float32)
    for axis, edge in enumerate(image.shape):
        starts = np.linspace(0, edge, min(BINS, edge), endpoint=False).astype(int)
        widths = np.diff([*starts, edge]).reshape([-1 if a == axis else 1 for a in range(3)])
        body = np.add.reduceat(body, starts, axis=axis) / widths
    return body >= BODY_SHARE


def sampled(image: np.ndarray) -> np.ndarray:
    """Return about ``SAMPLE`` voxels of an image (D, H, W)."""
    step = max(1, image.size // SAMPLE)
    while math.gcd(step, math.prod(image.shape[-2:])) > 1:  # else one column or row stands for all
        step += 1
    return image.ravel()[::step]


def index_file(folder: Path) -> Path:
    """Return the index of a folder of cases."""
    return folder.parent / f"nnssl_ext_index_{folder.name}.npz"


def copy_index(folder: Path, beside: Path) -> None:
    """Copy a folder's index to the folder ``beside`` a link to it, so that its cases are not read again."""
    source = index_file(folder)
    if source.is_file() and not (beside / source.name).is_file():
        with replaced_on_success(beside / source.name) as temporary:
            shutil.copyfile(source, temporary)
