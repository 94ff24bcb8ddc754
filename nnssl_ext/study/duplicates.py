"""Find held-out images that stand elsewhere under another name.

Published data sets hold exams twice. Preprocessed alike, the same image gives the same voxels, so cases are compared by
content.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.data.cases import open_case
from nnssl_ext.errors import UserError

#: Blocks per axis whose mean intensities are a case's signature.
BLOCKS = 8
#: Correlation of signatures from which two cases are one. One voxel more on a side leaves 0.998. Different subjects of
#: five data sets have at most 0.96: atrium 0.77, hippocampus 0.91, hearts and brains 0.96.
ALIKE = 0.99
#: Relative difference of an edge up to which two shapes may belong to one image.
SAME_EDGE = 0.02


def find_duplicates(data: Path, cases: Sequence[str], target: Path, held_out: Sequence[str]) -> dict[str, str]:
    """Find the cases that equal a held-out case by content.

    Args:
        data: Folder of preprocessed ``cases``.
        cases: Their identifiers.
        target: Folder of preprocessed held-out cases.
        held_out: Their identifiers.

    Returns:
        Case -> held-out case.

    Raises:
        UserError: If a case cannot be read.
    """
    shapes = {case: shape_of(target, case) for case in held_out}
    found = {}
    for case in sorted(cases):
        shape = shape_of(data, case)
        for other, of_other in shapes.items():
            # shapes are quick to read and tell most cases apart
            orders = [order for order in permutations(range(3)) if _similar(shape, [of_other[axis] for axis in order])]
            if orders and same_content(signature(data, case), signature(target, other), orders):
                found[case] = other
                break
    return found


def same_content(first: np.ndarray, second: np.ndarray, orders: Sequence[Sequence[int]]) -> bool:
    """Return whether two signatures belong to the same image, in any direction of axes.

    Args:
        first, second: As ``signature`` returns them.
        orders: Orders of the second one's axes to try.
    """
    flat, centered = first.ravel() - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(flat) * np.linalg.norm(centered))
    for order, steps in product(orders, product((1, -1), repeat=3)):
        turned = centered.transpose(order)[tuple(slice(None, None, step) for step in steps)]
        if turned.shape == first.shape and norm > 0 and float(flat @ turned.ravel()) / norm >= ALIKE:
            return True
    return False


@cache
def shape_of(folder: Path, case: str) -> tuple[int, ...]:
    """Return the shape (D, H, W) of a case."""
    return tuple(_open(folder, case).shape[1:])


@cache
def signature(folder: Path, case: str) -> np.ndarray:
    """Compute the block means of a case's first channel.

    Correlations of them do not depend on scale and offset of the intensities.
    """
    means = np.asarray(_open(folder, case)[:1], dtype=np.float32)[0]
    for axis, edge in enumerate(means.shape):
        bounds = np.linspace(0, edge, min(BLOCKS, edge) + 1).astype(int)
        sums = np.add.reduceat(means, bounds[:-1], axis=axis)
        means = sums / np.diff(bounds).reshape([-1 if a == axis else 1 for a in range(3)])
    return means


def _open(folder: Path, case: str) -> Any:
    try:
        return open_case(folder, case)
    except Exception as error:  # damaged files raise anything
        raise UserError(f"Case '{case}' in {folder} cannot be read ({error}). Preprocess it again.") from error


def _similar(shape: Sequence[int], other: Sequence[int]) -> bool:
    return all(abs(a - b) <= max(1, SAME_EDGE * max(a, b)) for a, b in zip(shape, other, strict=True))
