"""List and open preprocessed cases.

nnU-Net stores <case>.b2nd, or <case>.npz with its unpacked <case>.npy. Labels are never opened, so cases need none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.errors import UserError
from nnssl_ext.foreign import load_npz, open_blosc2

#: Suffixes of image data, the preferred one first.
SUFFIXES = (".b2nd", ".npy", ".npz")
#: Those whose size and time tell one state of a case from another: nnU-Net unpacks .npz when a training starts.
IDENTITY = (".b2nd", ".npz", ".npy")


def list_cases(folder: Path) -> dict[str, tuple[int, int]]:
    """List the cases of a folder with size and mtime."""
    found: dict[str, tuple[int, int, int]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix not in SUFFIXES or stem.endswith("_seg"):
                continue
            rank = IDENTITY.index(suffix)
            if stem not in found or rank < found[stem][0]:
                try:
                    stat = entry.stat()
                    found[stem] = (rank, stat.st_size, stat.st_mtime_ns)
                except OSError:  # a dangling link, or a file that goes away; whoever opens it says so
                    found[stem] = (rank, 0, 0)
    return {case: found[case][1:] for case in sorted(found)}


def stored_as(folder: Path) -> Any:
    """Return nnU-Net's class for the cases of a folder.

    Raises:
        UserError: For files of other kinds, or packed cases where nnU-Net cannot unpack them.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    try:
        found = infer_dataset_class(os.fspath(folder))
    except (AssertionError, KeyError) as error:
        kinds: dict[str, str] = {path.suffix: path.name for path in sorted(folder.iterdir()) if path.is_file()}
        names = shorten([name for suffix, name in kinds.items() if suffix not in (".pkl", ".npy")])
        raise UserError(
            f"{folder}: expected cases in .b2nd files or in .npz files, got {names or 'none'}. Move other files away, "
            f"or run nnUNetv2_preprocess into an empty folder"
        ) from error
    packed = next((path.name for path in folder.glob("*.npz") if not path.with_suffix(".npy").is_file()), "")
    if packed and not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} is read-only, and nnU-Net unpacks {packed} there. Make it writable, or preprocess with this "
            f"nnU-Net, whose .b2nd files need no unpacking"
        )
    return found


def open_case(folder: Path, case: str) -> Any:
    """Open a case (C, D, H, W).

    Slicing reads only the slice (.b2nd and .npy).

    Raises:
        FileNotFoundError: If there is no file of the case.
        Exception: Of many kinds, for damaged files.
    """
    for suffix in SUFFIXES:
        path = folder / f"{case}{suffix}"
        if path.is_file():
            break
    else:
        raise FileNotFoundError(f"no {' or '.join(SUFFIXES)} file of case '{case}' in {folder}")
    if suffix == ".b2nd":
        # nnU-Net too reads without mmap on Windows
        mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
        return open_blosc2(path, dparams={"nthreads": 1}, **mmap)
    if suffix == ".npy":
        return np.load(path, mmap_mode="r")
    return load_npz(path, "data")


def shorten(names: Iterable[str], most: int = 5) -> str:
    """Join names and cut them after ``most``."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def groups_of(cases: Sequence[str], pattern: str) -> list[str]:
    """Return the group of each case, which no split may divide.

    Args:
        cases: Case identifiers.
        pattern: Regular expression. Its first parenthesis, or else the whole match, names the group. '' makes each case
            a group.

    Raises:
        UserError: If the pattern is invalid or a case does not match.
    """
    if not pattern:
        return list(cases)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by: expected a regular expression, got '{pattern}' ({error})") from error
    matches = [expression.search(case) for case in cases]
    unmatched = [case for case, match in zip(cases, matches, strict=True) if match is None]
    if unmatched:
        raise UserError(
            f"--group-by: expected a match in every case's name, got none of '{pattern}' in {shorten(unmatched)}"
        )
    groups = [match[1 if expression.groups else 0] for match in matches if match]
    unnamed = [case for case, group in zip(cases, groups, strict=True) if group is None]
    if unnamed:
        raise UserError(
            f"--group-by: expected the first parenthesis of '{pattern}' to match in every case's name, got nothing in "
            f"{shorten(unnamed)}. Put all alternatives into one: (A|B)"
        )
    return groups
