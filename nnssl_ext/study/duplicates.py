"""Find held-out images that stand elsewhere under another name.

Published data sets hold exams twice. Preprocessed alike, the same image gives the same voxels, so cases are compared by
content: first coarsely, then by their fine detail at shifts of some voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from skimage.transform import resize_local_mean

from nnssl_ext.data.cases import open_case
from nnssl_ext.errors import UserError

#: Blocks per axis whose mean intensities are compared.
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


class Signature(NamedTuple):
    """What is compared of an image: its coarse block means, and the fine detail of finer ones."""

    coarse: np.ndarray
    detail: np.ndarray


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
    of_held_out = cache(partial(signature, target))
    found = {}
    for case in sorted(cases):
        shape = shape_of(data, case)
        of_case = cache(partial(signature, data, case))  # a large corpus does not fit into memory
        for other, of_other in shapes.items():
            # shapes are quick to read and tell most cases apart
            orders = [order for order in permutations(range(3)) if _similar(shape, [of_other[axis] for axis in order])]
            if orders and same_content(of_case(), of_held_out(other), orders):
                found[case] = other
                break
    return found


def same_content(first: Signature, second: Signature, orders: Sequence[Sequence[int]]) -> bool:
    """Return whether two signatures belong to one image, turned or shifted.

    Args:
        first, second: Signatures of the two.
        orders: Orders of the second one's axes to try, each in all directions.
    """
    return any(
        _correlation(first.coarse, _turned(second.coarse, *turn)) >= CANDIDATE
        and _shifted_correlation(first.detail, _turned(second.detail, *turn)) >= ALIKE
        for turn in product(orders, product((1, -1), repeat=3))
    )


def describe(image: np.ndarray) -> Signature:
    """Compute the signature of an image (D, H, W)."""
    fine = block_means(image, BLOCKS)
    return Signature(block_means(fine, COARSE), _detail(fine))


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


def shape_of(folder: Path, case: str) -> tuple[int, ...]:
    """Return the shape (D, H, W) of a case."""
    return tuple(_open(folder, case).shape[1:])


def signature(folder: Path, case: str) -> Signature:
    """Compute the signature of a case's first channel.

    Correlations of it do not depend on scale and offset of the intensities.
    """
    return describe(np.asarray(_open(folder, case)[:1], dtype=np.float32)[0])


def _open(folder: Path, case: str) -> Any:
    try:
        return open_case(folder, case)
    except Exception as error:  # damaged files raise anything
        raise UserError(f"Case '{case}' in {folder} cannot be read ({error}). Preprocess it again.") from error


def _similar(shape: Sequence[int], other: Sequence[int]) -> bool:
    return all(abs(a - b) <= max(1, SAME_EDGE * max(a, b)) for a, b in zip(shape, other, strict=True))
