"""Draw pretext.png: what a method shows of one fixed validation sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.files import replaced_on_success
from nnssl_ext.methods.panels import Panel

#: Pixels of the longest edge of a plane, space between planes and panels, height of a line of text.
TILE, SPACE, GAP, LINE = 132, 2, 12, 14
DPI = 100
#: Percentiles of a row's images that are black and white.
WINDOW = (0.5, 99.5)
EMPTY, PAPER = (0.45, 0.2, 0.25), (1.0, 1.0, 1.0)

Rows = list[list[Panel]]


class PretextPicture:
    """Draws the picture after the first epoch, every few epochs, and after the last one.

    Nothing that goes wrong here ends a run: ``log`` is called with a line. ``every`` 0 draws none.
    """

    def __init__(self, file: Path, every: int, epochs: int, log: Callable[[str], None]) -> None:
        self.file, self.every, self.epochs, self.log = file, every, epochs, log
        self.batch: CropBatch | None = None

    def __repr__(self) -> str:
        return f"PretextPicture(every {self.every} epochs)"

    def keep(self, batch: CropBatch, samples: int) -> None:
        """Keep a copy of the first samples of the first validation batch, which is the same in all epochs."""
        if self.every and self.batch is None:
            rows = [[replace(box, data=box.data.clone()) for box in row[:samples]] for row in batch.boxes]
            self.batch = CropBatch(batch.indices[:samples], rows)

    def update(self, epoch: int, title: str, spacing: Sequence[float], show: Callable[[CropBatch], Rows]) -> None:
        """Draw the picture if it is due.

        Epochs count from 0, spacing is in mm. ``show`` returns the rows of the kept samples.
        """
        if self.batch is None or (epoch % self.every and epoch != self.epochs - 1):
            return
        try:
            rows = show(self.batch)
            if rows:
                draw(rows, f"{title}, epoch {epoch}", spacing, self.file)
        except Exception as error:  # any: a picture is not worth a run
            self.log(f"WARNING: {self.file.name} could not be drawn: {type(error).__name__}: {error}")


def draw(rows: Rows, title: str, spacing: Sequence[float], file: Path) -> None:
    """Draw rows of panels, and replace the file only when it is complete."""
    canvas, texts = compose(rows, spacing)
    height, width = canvas.shape[:2]
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas, resize=True)
    text: dict[str, Any] = {"va": "top", "fontsize": 7.5, "linespacing": 1.15}
    figure.text(GAP / width, 1 - 5 / height, title, **{**text, "fontsize": 9})
    for left, top, words in texts:
        figure.text(left / width, 1 - top / height, words, **text)
    with replaced_on_success(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def compose(rows: Rows, spacing: Sequence[float]) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Lay out all planes in one image. Voxel edges are in mm.

    Returns:
        The image (height, width, 3), and the places of the titles: left, top, text.
    """
    placed, texts, top, right = [], [], GAP + LINE, 0
    for row in rows:
        lines = max(panel.title.count("\n") + 1 for panel in row)
        blocks = [_side_by_side(panel, tiles) for panel, tiles in zip(row, _tiles(row, spacing), strict=True)]
        left, floor = GAP, top + lines * LINE + SPACE
        for panel, block in zip(row, blocks, strict=True):
            texts.append((left, top, panel.title))
            placed.append((floor, left, block))
            left += block.shape[1] + GAP
        right, top = max(right, left), floor + max(len(block) for block in blocks) + GAP
    canvas = np.full((top, right, 3), PAPER)
    for upper, left, block in placed:
        canvas[upper : upper + len(block), left : left + block.shape[1]] = block
    return canvas, texts


def _tiles(row: list[Panel], spacing: Sequence[float]) -> list[list[np.ndarray]]:
    """Cut, color and enlarge the planes of a row's panels, all at one scale and with one window."""
    planes = [_planes(panel, spacing) for panel in row]
    values: dict[str, list[np.ndarray]] = {
        kind: [plane for panel, own in zip(row, planes, strict=True) if panel.kind == kind for plane, _ in own]
        for kind in ("image", "levels")
    }
    low, high = _window(values["image"])
    top = max((float(np.nanmax(plane)) for plane in values["levels"] if np.isfinite(plane).any()), default=0.0)
    scale = TILE / max(max(extent) for own in planes for _, extent in own)

    def colored(plane: np.ndarray, kind: str) -> np.ndarray:
        if kind == "colors":
            return plane
        shown = (plane - low) / (high - low) if kind == "image" else plane / max(top, 1)
        map_ = matplotlib.colormaps["gray" if kind == "image" else "viridis"]
        return np.where(np.isnan(plane)[..., None], EMPTY, map_(np.nan_to_num(shown))[..., :3])

    return [
        [_enlarged(colored(plane, panel.kind), [scale * edge for edge in extent]) for plane, extent in own]
        for panel, own in zip(row, planes, strict=True)
    ]


def _planes(panel: Panel, spacing: Sequence[float]) -> list[tuple[np.ndarray, tuple[float, float]]]:
    """Return the planes of a panel, channels last, and the extent of each in mm."""
    data = panel.data.detach().float().cpu().numpy()
    if panel.kind == "colors":
        data = np.moveaxis(data, 0, -1)
    axes = data.ndim - (panel.kind == "colors")
    edges = np.asarray(data.shape[:axes]) * spacing[3 - axes :]
    if axes == 2:
        return [(data, (edges[0], edges[1]))]
    center = panel.center or [edge // 2 for edge in data.shape[:3]]
    others = ((1, 2), (0, 2), (0, 1))
    return [(data.take(center[axis], axis), (edges[a], edges[b])) for axis, (a, b) in enumerate(others)]


def _window(planes: list[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([plane[np.isfinite(plane)] for plane in planes]) if planes else np.zeros(1)
    low, high = np.percentile(values, WINDOW) if values.size else (0.0, 1.0)
    return float(low), max(float(high), float(low) + 1e-6)


def _enlarged(plane: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """Repeat or drop pixels: (h, w, 3) -> about ``size``."""
    for axis, pixels in enumerate(max(1, round(edge)) for edge in size):
        edge = plane.shape[axis]
        plane = plane.take(((np.arange(pixels) + 0.5) * edge / pixels).astype(int), axis)
    return plane


def _side_by_side(panel: Panel, tiles: list[np.ndarray]) -> np.ndarray:
    # a title of many letters needs room, too
    width = max(len(line) for line in panel.title.split("\n")) * 6
    width = max(width, sum(tile.shape[1] + SPACE for tile in tiles) - SPACE)
    block, left = np.full((max(map(len, tiles)), width, 3), PAPER), 0
    for tile in tiles:
        block[: len(tile), left : left + tile.shape[1]] = tile
        left += tile.shape[1] + SPACE
    return block
