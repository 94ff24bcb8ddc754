"""Pictures of a report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nnssl_ext.study.protocol import TITLES
from nnssl_ext.study.statistics import sign_flip_interval

#: The colours of what every page shows.
COLOURS = {"scratch": "#4477aa", "pretrained": "#cc3311", "truth": "#228833", "scratch_total": "#77aadd"}
#: Those of other arms, in the order in which they come.
OTHERS = ("#cc3311", "#ee7733", "#aa3377", "#009988", "#bbaa33", "#555555", "#ee99aa", "#7755aa", "#996633", "#333399")


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm, the same wherever the same arms are shown."""
    others = cycle(OTHERS)
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in names}


@dataclass
class Overlay:
    """One row of ``slices``: an image (D, H, W) with the outlines of label maps over it."""

    title: str
    image: np.ndarray
    outlines: Mapping[str, np.ndarray]


def png(figure: Figure) -> bytes:
    """The picture, and the figure closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def curves(panels: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]]) -> bytes:
    """Panels side by side: (title, label of the y axis, name -> value per epoch)."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), constrained_layout=True, squeeze=False
    )
    for axis, (title, label, lines) in zip(axes.flat, panels, strict=True):
        for name, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="o", ms=3, color=COLOURS.get(name), label=name)
        axis.set(title=title, xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return png(figure)


def with_intervals(title: str, label: str, arms: Mapping[str, Mapping[int, Sequence[float]]]) -> bytes:
    """Dice over budgets or steps: arm -> place -> one score per run; lines are means, bars 95 % intervals of the mean
    (the range where there are too few runs for one), dots runs."""
    figure, axis = plt.subplots(figsize=(9.6 if len(arms) > 4 else 7.2, 4.4), constrained_layout=True)
    places = sorted({place for points in arms.values() for place, scores in points.items() if scores})
    for number, (name, colour) in enumerate(colours(arms).items()):
        points = {place: np.asarray(scores) for place, scores in arms[name].items() if len(scores)}
        # side by side, or intervals would hide each other
        x = np.array([place * 1.02 ** (number - len(arms) / 2) for place in points])
        means = [scores.mean() for scores in points.values()]
        limits = np.array([interval_or_range(scores) for scores in points.values()]).reshape(-1, 2)
        if len(x):
            spread = np.abs(limits.T - means)
            axis.errorbar(
                x, means, spread, color=colour, marker="o", ms=4, capsize=3, lw=1.5, label=TITLES.get(name, name)
            )
        for place, scores in zip(x, points.values(), strict=True):
            axis.plot(np.full(len(scores), place), scores, ".", color=colour, ms=3, alpha=0.4)
    if len(places) > 1:
        axis.set_xscale("log")
    axis.set_xticks(places, [str(place) for place in places])
    axis.minorticks_off()
    axis.set(title=title, xlabel=label, ylabel="Dice")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        if len(arms) > 4:  # beside the picture
            axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axis.legend(fontsize="small")
    return png(figure)


def interval_or_range(scores: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of R scores, or their range where R is too small for one."""
    low, high = sign_flip_interval(scores)
    return (low, high) if np.isfinite(low) else (float(scores.min()), float(scores.max()))


def bars(values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Dice per class: class -> arm -> one value per case; bars are means, dots are cases."""
    figure, axis = plt.subplots(figsize=(max(5.0, 1.6 * len(values) + 1.5), 3.6), constrained_layout=True)
    for place, (_, arms) in enumerate(values.items()):
        for offset, (arm, dice) in zip((-0.2, 0.2), arms.items(), strict=True):
            known = np.asarray(dice, dtype=float)
            known = known[~np.isnan(known)]
            axis.bar(
                place + offset,
                known.mean() if known.size else 0,
                0.36,
                color=COLOURS[arm],
                alpha=0.55,
                label=arm if not place else None,
            )
            spread = np.linspace(-0.1, 0.1, known.size) if known.size else known
            axis.plot(place + offset + spread, known, ".", color=COLOURS[arm], ms=3)
    axis.set_xticks(range(len(values)), list(values))
    axis.set(ylabel="Dice", ylim=(0, 1), title="Dice per class: means and test cases")
    axis.legend(fontsize="small")
    return png(figure)


def slices(overlays: Sequence[Overlay]) -> bytes:
    """Each row an image's three middle planes through its labels, with outlines."""
    figure, axes = plt.subplots(
        len(overlays), 3, figsize=(10.5, 3.6 * len(overlays)), constrained_layout=True, squeeze=False
    )
    colour = colours(overlays[0].outlines)
    for row, overlay in zip(axes, overlays, strict=True):
        truth = next(iter(overlay.outlines.values())) > 0
        for number, axis in enumerate(row):
            index = _busiest(truth, number)
            axis.imshow(np.take(overlay.image, index, number), cmap="gray", interpolation="nearest")
            for name, labels in overlay.outlines.items():
                plane = np.take(labels, index, number)
                for value in np.unique(plane[plane > 0]):
                    axis.contour(plane == value, [0.5], colors=colour[name], linewidths=1.1)
            axis.set_axis_off()
            axis.set_title(f"{overlay.title}, {('axial', 'coronal', 'sagittal')[number]} {index}", fontsize="small")
    handles = [plt.Line2D([], [], color=colour[name], label=name) for name in overlays[0].outlines]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return png(figure)


def _busiest(labels: np.ndarray, axis: int) -> int:
    """The plane with most labelled voxels."""
    return int(np.argmax(np.sum(labels, axis=tuple(a for a in range(3) if a != axis))))
