"""Find held-out images that stand elsewhere under another name.

Published data sets hold exams twice. Preprocessed alike, the same image gives the same voxels, so cases are compared by
content: first coarsely, then by their fine detail at shifts of some voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from skimage.transform import resize_local_mean

from nnssl_ext.data.cases import open_case
from nnssl_ext.errors import UserError

#: Blocks per axis whose mean intensities are a case's signature.
BLOCKS = 32
#: The same, coarse and quick. Correlation from which two cases are compared closely.
COARSE, CANDIDATE = 8, 0.8
#: Shift between two cuts of one image that is looked for, in blocks.
SHIFT = 4
#: Correlation of fine detail from which two cases are one. Two cuts of one image and repeated scans have 0.87 to 1.0,
#: two frames of a heart up to 0.9, different hearts and brains up to 0.61.
ALIKE = 0.83
#: Relative difference of an edge up to which two shapes may belong to one image.
SAME_EDGE = 0.05


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
    """Return whether two signatures belong to one image, turned or shifted.

    Args:
        first, second: As ``signature`` returns them.
        orders: Orders of the second one's axes to try, each in all directions.
    """
    coarse, other = block_means(first, COARSE), block_means(second, COARSE)
    turns = [
        (order, steps)
        for order, steps in product(orders, product((1, -1), repeat=3))
        if _correlation(coarse, _turned(other, order, steps)) >= CANDIDATE
    ]
    if not turns:
        return False
    detail, other = _detail(first), _detail(second)
    return any(_shifted_correlation(detail, _turned(other, *turn)) >= ALIKE for turn in turns)


def block_means(image: np.ndarray, blocks: int) -> np.ndarray:
    """Average an image (D, H, W) over at most ``blocks`` blocks per axis."""
    return np.asarray(resize_local_mean(image, [min(blocks, edge) for edge in image.shape], preserve_range=True))


def _turned(image: np.ndarray, order: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    return image.transpose(order)[tuple(slice(None, None, step) for step in steps)]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if first.shape != second.shape:
        return 0.0
    a, b = (array.ravel() - array.mean() for array in (first, second))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _detail(image: np.ndarray) -> np.ndarray:
    """Take away what subjects have in common: everything smoother than a sixteenth of the image."""
    smooth = gaussian_filter(image, [max(edge / 16, 1) for edge in image.shape])
    return np.asarray(image - smooth)


def _shifted_correlation(image: np.ndarray, other: np.ndarray) -> float:
    """Correlate an image with the middle of another at every shift, and return the highest value."""
    margins = [
        max(min(SHIFT, edge // 8), -(-(edge - size) // 2)) for edge, size in zip(other.shape, image.shape, strict=True)
    ]
    middle = other[tuple(slice(m, edge - m) for m, edge in zip(margins, other.shape, strict=True))]
    middle = middle - middle.mean()
    # skimage's match_template gives the same and takes six times as long
    covariance = fftconvolve(image, middle[::-1, ::-1, ::-1], mode="valid")
    ones = np.ones_like(middle)
    sums, squares = fftconvolve(image, ones, mode="valid"), fftconvolve(image**2, ones, mode="valid")
    norms = np.sqrt(np.maximum(squares - sums**2 / middle.size, 0)) * np.linalg.norm(middle)
    return float(np.divide(covariance, norms, out=np.zeros_like(covariance), where=norms > 1e-3 * norms.max()).max())


@cache
def shape_of(folder: Path, case: str) -> tuple[int, ...]:
    """Return the shape (D, H, W) of a case."""
    return tuple(_open(folder, case).shape[1:])


@cache
def signature(folder: Path, case: str) -> np.ndarray:
    """Compute the block means of a case's first channel.

    Correlations of them do not depend on scale and offset of the intensities.
    """
    return block_means(np.asarray(_open(folder, case)[:1], dtype=np.float32)[0], BLOCKS)


def _open(folder: Path, case: str) -> Any:
    try:
        return open_case(folder, case)
    except Exception as error:  # damaged files raise anything
        raise UserError(f"Case '{case}' in {folder} cannot be read ({error}). Preprocess it again.") from error


def _similar(shape: Sequence[int], other: Sequence[int]) -> bool:
    return all(abs(a - b) <= max(1, SAME_EDGE * max(a, b)) for a, b in zip(shape, other, strict=True))
