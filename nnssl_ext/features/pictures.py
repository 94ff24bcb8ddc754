"""Draw vectors and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nnssl_ext.files import replaced_on_success

#: Slices of a map that are shown.
SLICES = 5
#: Percentiles of a component that black and full color stand for.
RANGE = (2, 98)


def draw_vectors(vectors: Mapping[int, np.ndarray], labels: Sequence[str], path: Path) -> None:
    """Draw the first two principal components of the vectors.

    Each stage has a panel. Columns are brought to unit variance first. Components are drawn at one scale.

    Args:
        vectors: Stage -> (cases, columns).
        labels: One for each case, which colors it.
    """
    figure, axes = plt.subplots(
        1, len(vectors), figsize=(4.2 * len(vectors), 4.4), constrained_layout=True, squeeze=False
    )
    kinds = sorted(set(labels))
    colors = plt.get_cmap("tab10" if len(kinds) <= 10 else "turbo", max(len(kinds), 10))
    for axis, (stage, values) in zip(axes[0], vectors.items(), strict=True):
        deviation = values.std(0)
        scaled = (values - values.mean(0)) / np.where(deviation > 0, deviation, 1)
        left, sizes, _ = np.linalg.svd(scaled, full_matrices=False)
        points, shares = left * sizes, sizes**2 / max((sizes**2).sum(), 1e-12)
        points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
        for number, kind in enumerate(kinds):
            chosen = np.array([label == kind for label in labels])
            axis.scatter(*points[chosen, :2].T, s=14, alpha=0.75, color=colors(number), label=kind or None)
        names = [f"component {n + 1} ({share:.0%})" for n, share in enumerate(shares[:2])]
        axis.set(title=f"stage {stage}", xlabel=names[0], ylabel=names[-1], aspect="equal", adjustable="datalim")
        axis.grid(alpha=0.3)
    if len(kinds) > 1:
        handles, shown = axes[0][0].get_legend_handles_labels()
        figure.legend(handles[:20], shown[:20], loc="outside lower center", ncols=min(len(kinds), 4))
    _write(figure, path)


def draw_map(image: np.ndarray, maps: Mapping[int, np.ndarray], aspect: float, name: str, path: Path) -> None:
    """Draw slices of an image and of its maps in color.

    Args:
        image: (D, H, W).
        maps: Stage -> (3, D, H, W), drawn as red, green and blue. Missing components are black.
        aspect: Height of a voxel to its width.
        name: Name of the case.
    """
    count = min(SLICES, len(image))
    slices = [round((place + 0.5) * len(image) / count - 0.5) for place in range(count)]
    height = 1.9 * image.shape[1] * aspect / image.shape[2]
    figure, axes = plt.subplots(
        len(maps) + 1,
        count,
        figsize=(0.5 + 1.9 * count, 0.5 + (height + 0.1) * (len(maps) + 1)),
        constrained_layout=True,
        squeeze=False,
    )
    rows = [("image", _scaled(image[None]))] + [(f"stage {stage}", _scaled(found)) for stage, found in maps.items()]
    for row, (title, values) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title)
        for axis, place in zip(row, slices, strict=True):
            colors = np.repeat(values[:, place], 3 // len(values), axis=0)
            axis.imshow(colors.transpose(1, 2, 0), aspect=aspect, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, place in zip(axes[0], slices, strict=True):
        axis.set_title(f"slice {place}", fontsize=9)
    figure.suptitle(f"{name}: first three principal components as colors", fontsize=10)
    _write(figure, path)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scale each component to 0 to 1: (K, D, H, W)."""
    low, high = np.percentile(values, RANGE, axis=(1, 2, 3), keepdims=True)
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1)
    return np.pad(scaled, ((0, 3 - len(scaled)), *[(0, 0)] * 3)) if len(scaled) == 2 else scaled


def _write(figure: Figure, path: Path) -> None:
    with replaced_on_success(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
