"""Solve the layout of patches in a window.

A method reads one window and cuts its patches out of it. A patch has two voxels per axis at the deepest encoder stage
that is run. Every encoder can take that. At one voxel an instance norm and a residual skip fail or are silently wrong.
The deepest stage whose window fits into the cases is taken, so that the network sees the plan's resolution. Only where
no stage fits is the window magnified, up to a limit. It is never padded, because padding reveals a patch's place.

B batch, N patches, C channel, D H W voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.errors import UserError
from nnssl_ext.networks.base import Triple, triple
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import SourceBox, crop_batch

#: A patch whose longest edge is shorter shows nothing.
MIN_EDGE = 8
#: Along an axis on which a window spans less of the case, in voxels, patches are not shifted.
MIN_SPAN = 2


@dataclass(frozen=True)
class Layout:
    """Patches on a grid, with gaps and jitter.

    Attributes:
        grid: Patches along each axis.
        patch: Edges of a patch in voxels.
        gap: Least distance of neighbors in voxels. In a magnified window it includes room for shifts.
        jitter: Largest shift of a patch in voxels.
        stages: Encoder stages that are run and trained.
        zoom: Magnification of the window.
    """

    grid: Triple
    patch: Triple
    gap: Triple
    jitter: Triple
    stages: int
    zoom: float

    @property
    def window(self) -> Triple:
        """Edges of the window that holds all patches."""
        return triple(
            n * (p + j) + (n - 1) * g for n, p, g, j in zip(self.grid, self.patch, self.gap, self.jitter, strict=True)
        )

    def __str__(self) -> str:
        return (
            f"{math.prod(self.grid)} patches ({format_edges(self.grid)}) of {format_edges(self.patch)} voxels in a "
            f"window of {format_edges(self.window)}, magnified {self.zoom:.2f} times; {self.stages} encoder stages "
            "are trained"
        )

    @property
    def pitch(self) -> Triple:
        """Distance of consecutive patches without jitter."""
        return triple(p + g + j for p, g, j in zip(self.patch, self.gap, self.jitter, strict=True))

    @property
    def middles(self) -> list[tuple[Triple, Triple]]:
        """Return each patch's lowest voxel and edges at half its jitter."""
        return [
            (triple(n * step + j // 2 for n, step, j in zip(place, self.pitch, self.jitter, strict=True)), self.patch)
            for place in product(*map(range, self.grid))
        ]

    def starts(self, random: BatchRandom) -> Tensor:
        """Draw the lowest voxel of each patch in its window: (B, N, 3) on the CPU."""
        places = torch.tensor(list(product(*map(range, self.grid))))
        jitter = [random.integers(0, limit, (len(places),)) for limit in self.jitter]
        return places * torch.tensor(self.pitch) + torch.stack(jitter, -1)


def cut_patches(
    boxes: Sequence[SourceBox],
    window: Sequence[int],
    starts: Tensor,
    patch: Sequence[int],
    shifts: Tensor,
    device: torch.device,
) -> Tensor:
    """Cut patches out of windows: (B, N, C, *patch) float32.

    Patches are copies, or resampled where the window is magnified. Interpolation smooths more the farther it reads
    from a voxel's center. In a magnified window that smoothing follows one pattern, and noise reveals a patch's place.
    So each patch of a magnified window is shifted by up to one voxel of the case along each axis. The window is made
    smaller to leave room for that.

    Args:
        boxes: The unrotated windows, which lie within their cases.
        window, patch: Edges in voxels.
        starts: (B, N, 3) lowest voxel of each patch in its window.
        shifts: (B, N, 3) in [0, 1), share of a voxel of the case by which each patch is shifted.
    """
    placed = []
    for box, places, shift in zip(boxes, starts.numpy(), shifts.numpy(), strict=True):
        scale = np.diag(box.matrix)
        half = scale * (np.asarray(window) - 1) / 2
        # an unmagnified window is copied; a single plane leaves no room
        room = (2 * half >= MIN_SPAN) * (scale != 1).any()
        scale = scale * (1 - room / np.maximum(2 * half, 1))
        centers = box.center - half + (places + (np.asarray(patch) - 1) / 2) * scale + shift * room
        placed += [SourceBox(box.data, np.diag(scale), center, box.case) for center in centers]
    crops, _ = crop_batch(placed, patch, device)
    return crops.unflatten(0, (len(boxes), -1))


def standardize(patches: Tensor) -> Tensor:
    """Scale to zero mean and unit deviation. Over the last three axes. A constant patch becomes zero."""
    deviation, mean = torch.std_mean(patches, (-3, -2, -1), keepdim=True, correction=0)
    return (patches - mean) / deviation.clamp_min(1e-3)


def patch_sizes(strides: Sequence[Sequence[int]]) -> Iterator[tuple[int, Triple]]:
    """Yield (stages, patch) while patches are large enough. From the deepest stage up."""
    for stages in range(len(strides), 0, -1):
        patch = triple(2 * stride for stride in strides[stages - 1])
        if max(patch) >= MIN_EDGE:
            yield stages, patch


def magnification(window: Sequence[int], case_size: Sequence[int]) -> float:
    """Compute a window's magnification in cases, at least 1."""
    return max(1.0, *(edge / case for edge, case in zip(window, case_size, strict=True)))


def patch_zoom(window: Sequence[int], zoom: float, case_size: Sequence[int]) -> float:
    """Compute the largest magnification of a window's patches.

    It is that along one axis, and larger than ``zoom``, the window's: patches leave a voxel of the case for their
    shifts, and the window ends at the centers of the case's outermost voxels.
    """
    if zoom == 1:
        return 1.0
    found = [zoom]
    for edge, case in zip(window, case_size, strict=True):
        span = min((edge - 1) / zoom, case - 1)
        if span:  # a single plane is repeated
            found.append((edge - 1) / (span - (span >= MIN_SPAN)))
    return max(found)


def longest_edge(case: int, max_zoom: float) -> float:
    """Compute the longest edge of a window along an axis.

    Its ``patch_zoom`` along this axis is then at most ``max_zoom``.
    """
    span = case - 1 - (case - 1 >= MIN_SPAN)
    return max(case, 1 + max_zoom * span) if span else max_zoom


def shift_room(zoom: float) -> int:
    """Compute the largest shift of a patch in voxels."""
    return math.ceil(zoom) if zoom > 1 else 0


def solve_layout(
    strides: Sequence[Sequence[int]],
    case_size: Sequence[int],
    *,
    title: str,
    gap: float,
    jitter: float,
    max_zoom: float,
    min_patches: int,
    max_voxels: float = math.inf,
    choices: Sequence[int] = (1, 2, 3),
) -> Layout:
    """Find the layout of least magnification.

    At the deepest stage, with most patches. A ``UserError`` names the method's ``title`` if nothing fits.

    Args:
        strides: Cumulative stride of each encoder stage.
        gap, jitter: Shares of a patch's edge, rounded up to voxels.
        max_voxels: Most voxels of all patches together, if there is a smaller grid.
        choices: Allowed numbers of patches along an axis.
    """
    windows: list[Triple] = []
    candidates: list[Layout] = []
    for stages, patch in patch_sizes(strides):
        found: list[Layout] = []
        gaps, jitters = triple(math.ceil(gap * p) for p in patch), triple(math.ceil(jitter * p) for p in patch)
        for grid in product(choices, repeat=3):
            if math.prod(grid) < min_patches:
                continue
            bare = Layout(triple(grid), patch, gaps, jitters, stages, 1.0)
            windows.append(_widened(bare, shift_room(max_zoom)).window)
            layout = _magnify(bare, case_size, max_zoom)
            if patch_zoom(layout.window, layout.zoom, case_size) <= max_zoom:
                found.append(layout)
        affordable = [layout for layout in found if math.prod(layout.grid + patch) <= max_voxels]
        candidates += affordable or sorted(found, key=lambda layout: (math.prod(layout.grid), layout.zoom))[:1]
    if candidates:
        return max(candidates, key=lambda layout: (-layout.zoom, layout.stages, math.prod(layout.grid), layout.grid))
    raise nothing_fits(title, f"{min_patches} patches", strides, case_size, max_zoom, windows)


def _magnify(layout: Layout, case_size: Sequence[int], max_zoom: float) -> Layout:
    """Set the zoom and widen gaps for shifts."""
    bare, room = layout, 0
    while True:
        zoom = magnification(layout.window, case_size)
        if shift_room(zoom) <= room or zoom > max_zoom:
            return replace(layout, zoom=zoom)
        room = shift_room(zoom)
        layout = _widened(bare, room)


def _widened(layout: Layout, room: int) -> Layout:
    """Widen the gaps for shifts, in voxels."""
    return replace(layout, gap=triple(gap + room for gap in layout.gap))


def nothing_fits(
    title: str,
    what: str,
    strides: Sequence[Sequence[int]],
    case_size: Sequence[int],
    max_zoom: float,
    windows: Sequence[Triple],
) -> UserError:
    """Build the error of a failed solver.

    Larger cases would hold the ``windows``, with room for shifts.
    """
    smallest = min((patch for _, patch in patch_sizes(strides)), default=None)
    least = f"of {smallest} voxels " if smallest else ""
    advice = ""
    if windows:
        window = min(windows, key=math.prod)
        # with these ``patch_zoom`` is at most ``max_zoom``
        share = 1 / max_zoom + 1 / (min(window) - 1)
        needed = [min(edge, math.ceil(max(edge * share, (edge - 1) / max_zoom + 2))) for edge in window]
        advice = f"; cases of {format_edges(needed)} would do"
    return UserError(
        f"{title} needs {what} {least}side by side, but cases of {tuple(case_size)} voxels hold none even magnified "
        f"{max_zoom:g} times{advice}. Use larger cases, a higher zoom, or a method without patches (rotation, exemplar)"
    )


def format_edges(edges: Sequence[int]) -> str:
    """Format edges as '16 x 32 x 32'."""
    return " x ".join(map(str, edges))
