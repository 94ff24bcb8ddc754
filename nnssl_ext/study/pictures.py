"""Draw a report's pictures as PNG bytes.

All are narrow, so that a phone shows their text at a readable size.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnssl_ext.study.protocol import TITLES
from nnssl_ext.study.statistics import Effect, sign_flip_interval

#: Colors of what every page shows.
COLORS = {"scratch": "#4477aa", "pretrained": "#cc3311", "truth": "#228833", "scratch_total": "#77aadd"}
#: Colors of other arms, in their order.
OTHERS = ("#cc3311", "#ee7733", "#aa3377", "#009988", "#bbaa33", "#555555", "#ee99aa", "#7755aa", "#996633", "#333399")
#: Colors of intervals without 0.
GAIN, LOSS = "#228833", "#cc3311"
#: Most arms that one plot shows together.
TOGETHER = 5
#: Width of a plot in inches, and its resolution.
WIDTH, DPI = 4.6, 200
#: Pixels of the longer edge of a tile.
TILE = 320


def colors(names: Iterable[str]) -> dict[str, str]:
    """Assign each arm its color, equal on all pages."""
    others = cycle(OTHERS)
    return {name: COLORS[name] if name in COLORS else next(others) for name in names}


def png(figure: Figure) -> bytes:
    """Encode a figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()


def forest(rows: Sequence[tuple[str, Effect]], label: str = "points of Dice", row_height: float = 0.34) -> bytes:
    """Draw a forest plot: one difference with interval per row.

    Args:
        rows: Name and effect of each comparison. Open intervals are drawn as a point alone.
        label: Label of the axis, in points.
        row_height: Height of a row in inches.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + row_height * len(rows)), constrained_layout=True)
    for place, (_, effect) in enumerate(rows):
        finite = np.isfinite(effect.low)
        color = GAIN if finite and effect.low > 0 else LOSS if finite and effect.high < 0 else "#555555"
        if finite:
            axis.plot([100 * effect.low, 100 * effect.high], [place, place], color=color, lw=2)
        axis.plot(100 * effect.mean, place, "o", color=color, ms=6)
    axis.axvline(0, color="#999999", lw=1)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    return png(figure)


def curves(label: str, lines: Mapping[str, Sequence[float]]) -> bytes:
    """Draw one value per epoch and line."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0), constrained_layout=True)
    for name, values in lines.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", ms=3, color=COLORS.get(name), label=name)
    axis.set(xlabel="epoch", ylabel=label)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend()
    return png(figure)


def with_intervals(label: str, arms: Mapping[str, Mapping[int, Sequence[float]]]) -> bytes:
    """Draw Dice over budgets or steps with 95 % intervals of the mean.

    The range is drawn where there are too few runs for an interval. Many arms get a plot each, beside the baselines.

    Args:
        label: Label of the x axis.
        arms: Arm -> place on the axis -> one score per run.
    """
    baselines = [name for name in arms if name in TITLES]
    others = [name for name in arms if name not in TITLES]
    panels = [[*baselines, name] for name in others] if len(arms) > TOGETHER else [list(arms)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.6 + 0.2 * min(len(arms), TOGETHER) + (2.4 if len(panels) == 1 else 1.6 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), constrained_layout=True, squeeze=False, sharex=True, sharey=True
    )
    palette = colors(arms) if len(panels) == 1 else {**dict.fromkeys(others, COLORS["pretrained"]), **COLORS}
    places = sorted({place for points in arms.values() for place, scores in points.items() if len(scores)})
    for axis, names in zip(axes.flat, panels, strict=False):
        _draw_lines(axis, {name: arms[name] for name in names}, palette)
        axis.set_xscale("log")
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if len(panels) > 1:
            axis.set_title(names[-1], fontsize="medium")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(label)
    for axis in axes[:, 0]:
        axis.set_ylabel("Dice")
    lines = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    named = {title: lines[title] for title in (TITLES.get(name, name) for name in panels[0]) if title in lines}
    if len(panels) > 1:  # the arm is in each title
        named.pop(others[0], None)
    if named:
        figure.legend(list(named.values()), list(named), loc="outside lower center")
    return png(figure)


def _draw_lines(axis: Axes, arms: Mapping[str, Mapping[int, Sequence[float]]], palette: Mapping[str, str]) -> None:
    for number, (name, given) in enumerate(arms.items()):
        points = {place: np.asarray(scores) for place, scores in given.items() if len(scores)}
        if not points:
            continue
        # side by side, or intervals would hide each other
        x = np.array([place * 1.02 ** (number - len(arms) / 2) for place in points])
        means = [scores.mean() for scores in points.values()]
        limits = np.array([interval_or_range(scores) for scores in points.values()]).reshape(-1, 2)
        spread = np.abs(limits.T - means)
        title = TITLES.get(name, name)
        axis.errorbar(x, means, spread, color=palette[name], marker="o", ms=4, capsize=3, lw=1.5, label=title)


def interval_or_range(scores: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean. It is the range where there are too few scores."""
    low, high = sign_flip_interval(scores)
    return (low, high) if np.isfinite(low) else (float(scores.min()), float(scores.max()))


def bars(values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Draw mean Dice per class, and cases as dots. ``values``: class -> arm -> one value per case."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.0 + 0.55 * len(values)), constrained_layout=True)
    for place, arms in enumerate(values.values()):
        for offset, (arm, dice) in zip((-0.2, 0.2), arms.items(), strict=True):
            known = np.asarray(dice, dtype=float)
            known = known[~np.isnan(known)]
            mean = known.mean() if known.size else 0
            label = arm if not place else None
            axis.barh(place + offset, mean, 0.36, color=COLORS[arm], alpha=0.55, label=label)
            axis.plot(known, place + offset + np.linspace(-0.1, 0.1, known.size), ".", color=COLORS[arm], ms=3)
    axis.set_yticks(range(len(values)), list(values))
    axis.set(xlabel="Dice", xlim=(0, 1), ylim=(len(values) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=2)
    return png(figure)


def tile(image: np.ndarray, labels: np.ndarray | None, color: str, box: tuple[slice, slice]) -> bytes:
    """Draw one slice with its labels as outlines.

    Args:
        image: (H, W) gray values.
        labels: (H, W) label map, or None.
        color: Color of the outlines.
        box: Rows and columns to show.
    """
    shown = image[box]
    height, width = shown.shape
    size = TILE / max(height, width) / DPI
    figure = plt.figure(figsize=(width * size, height * size))
    axis = figure.add_axes((0, 0, 1, 1))
    low, high = np.percentile(shown, (1, 99))
    axis.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    if labels is not None:
        for value in np.unique(labels[box]):
            if value > 0:
                axis.contour(labels[box] == value, [0.5], colors=color, linewidths=1.0)
    axis.set_axis_off()
    return png(figure)


def busiest_slice(labels: np.ndarray) -> tuple[int, tuple[slice, slice]]:
    """Return the axial slice with most labels and its box."""
    index = int(np.argmax((labels > 0).sum((1, 2))))
    plane, box = labels[index] > 0, []
    for axis in (0, 1):
        where = np.flatnonzero(plane.any(1 - axis))
        if not where.size:
            box.append(slice(0, plane.shape[axis]))
            continue
        margin = max(8, (where[-1] - where[0]) // 3)
        box.append(slice(max(0, where[0] - margin), where[-1] + 1 + margin))
    return index, (box[0], box[1])
