"""Where the patches of a puzzle lie: the layout solver, shared by jigsaw, relative patch location and CPC.

B batch, N patches, C channel, D H W voxels. A method reads one window; its patches are cut out of it. A patch has two
voxels per axis at the encoder's stage that is read, which every encoder can take: an instance norm and a residual
skip fail or are silently wrong at one. The deepest stage is wanted; a window that is larger than the cases is read
magnified, up to a limit; it is never padded, because padding tells where a patch is from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.errors import UserError
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.spatial import SourceBox, crop_box

#: A patch whose longest edge is shorter shows nothing.
SMALLEST_EDGE = 8

Edges = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Patches on a grid, apart from each other and jittered.

    Attributes:
        cells: Patches along each axis.
        patch: Their edges in voxels.
        gap: Least distance of neighbours, in voxels; of a magnified window with what patches may be moved.
        jitter: How far a patch may be moved from its place, in voxels.
        stages: How many encoder stages are read, and so trained.
        zoom: Magnification of the window.
    """

    cells: Edges
    patch: Edges
    gap: Edges
    jitter: Edges
    stages: int
    zoom: float

    @property
    def window(self) -> Edges:
        """Edges of the window that holds all patches."""
        return _edges(
            n * (p + j) + (n - 1) * g for n, p, g, j in zip(self.cells, self.patch, self.gap, self.jitter, strict=True)
        )

    def __str__(self) -> str:
        return (
            f"{math.prod(self.cells)} patches ({sized(self.cells)}) of {sized(self.patch)} voxels in a window of "
            f"{sized(self.window)}, magnified {self.zoom:.2f} times; {self.stages} encoder stages are read"
        )

    @property
    def pitch(self) -> Edges:
        """From one patch to the next, not jittered."""
        return _edges(p + g + j for p, g, j in zip(self.patch, self.gap, self.jitter, strict=True))

    @property
    def middles(self) -> list[tuple[Edges, Edges]]:
        """Lowest voxel and edges of each patch in the window, not jittered."""
        return [
            (_edges(n * step + j // 2 for n, step, j in zip(cell, self.pitch, self.jitter, strict=True)), self.patch)
            for cell in product(*map(range, self.cells))
        ]

    def starts(self, random: BatchRandom) -> Tensor:
        """Lowest voxel of each patch in its window, jitter drawn: (B, N, 3), on the CPU."""
        cells = torch.tensor(list(product(*map(range, self.cells))))
        moved = [random.integers(0, jitter, (len(cells),)) for jitter in self.jitter]
        return cells * torch.tensor(self.pitch) + torch.stack(moved, -1)


def cut_patches(
    box: SourceBox, window: Sequence[int], starts: Tensor, patch: Sequence[int], moved: Tensor, device: torch.device
) -> Tensor:
    """Patches of one window, (N, C, *patch) float32: copies, or resampled where the window is magnified.

    Interpolation smooths the more, the farther from a voxel's centre it reads: in a magnified window what is smoothed
    follows one pattern, and noise tells where in the window a patch lies. So each patch of a magnified window is moved
    by itself, by up to one voxel of the case along each axis, for which the window is made smaller.

    Args:
        box: What was read for the window, which is not turned.
        window: Edges of the window, all of which lies in the case.
        starts: (N, 3) lowest voxel of each patch in the window.
        patch: Edges of a patch.
        moved: (N, 3) in [0, 1), by what part of a voxel of the case each patch is moved.
        device: Of the patches.
    """
    scale = np.diag(box.matrix)
    if (scale == 1).all():
        image, _ = crop_box(box, window, device)
        depth, height, width = patch
        return torch.stack([image[:, z : z + depth, y : y + height, x : x + width] for z, y, x in starts.tolist()])
    data = box.data.to(device, torch.float32, non_blocking=True)
    half = scale * (np.asarray(window) - 1) / 2
    room = (2 * half >= 2).astype(float)  # of one plane there is nothing to be moved
    scale = scale * (1 - room / np.maximum(2 * half, 1))
    first = box.center - half + starts.numpy() * scale + moved.numpy() * room  # (N, 3)
    # grid_sample's coordinates (align_corners=False): voxel x of n lies at (2 x + 1) / n - 1, axes in reverse order
    lines = [
        (2 * (first[:, axis, None] + np.arange(patch[axis]) * scale[axis]) + 1) / data.shape[1 + axis] - 1
        for axis in range(3)
    ]
    z, y, x = (to_device(torch.from_numpy(line), device, torch.float32) for line in lines)
    grid = torch.stack(
        torch.broadcast_tensors(x[:, None, None, :], y[:, None, :, None], z[:, :, None, None]), -1
    )  # (N, D, H, W, 3)
    return F.grid_sample(data.expand(len(grid), -1, -1, -1, -1), grid, padding_mode="border", align_corners=False)


def standardise(patches: Tensor) -> Tensor:
    """Zero mean and unit deviation per patch and channel over the last three axes; a constant patch becomes zero."""
    deviation, mean = torch.std_mean(patches, (-3, -2, -1), keepdim=True, correction=0)
    return (patches - mean) / deviation.clamp_min(1e-3)


def patch_sizes(strides: Sequence[Sequence[int]]) -> Iterator[tuple[int, Edges]]:
    """(stages, patch) from the deepest stage up, while patches show anything."""
    for stages in range(len(strides), 0, -1):
        patch = _edges(2 * stride for stride in strides[stages - 1])
        if max(patch) >= SMALLEST_EDGE:
            yield stages, patch


def magnification(window: Sequence[int], case_size: Sequence[int]) -> float:
    """How far a window must be magnified so that cases of this size hold it; 1 where they do anyway."""
    return max(1.0, *(edge / case for edge, case in zip(window, case_size, strict=True)))


def moves(zoom: float) -> int:
    """Voxels of a window by which ``cut_patches`` may move a patch."""
    return math.ceil(zoom) if zoom > 1 else 0


def solve_layout(
    strides: Sequence[Sequence[int]],
    case_size: Sequence[int],
    *,
    title: str,
    gap: float,
    jitter: float,
    most_zoom: float,
    fewest: int,
    most_voxels: float = math.inf,
    choices: Sequence[int] = (1, 2, 3),
) -> Layout:
    """The layout with most patches at the deepest stage at which it fits.

    Args:
        strides: Cumulative stride of each encoder stage.
        case_size: Edges that cases have.
        title: The method, for the message.
        gap, jitter: Shares of a patch's edge, rounded up to voxels.
        most_zoom: Largest magnification.
        fewest: Fewest patches that make a task.
        most_voxels: Most voxels of all patches together, if there is a smaller grid.
        choices: Patches along an axis to choose from.

    Raises:
        UserError: If nothing fits.
    """
    windows: list[Edges] = []
    for stages, patch in patch_sizes(strides):
        found: list[Layout] = []
        apart, moved = _edges(math.ceil(gap * p) for p in patch), _edges(math.ceil(jitter * p) for p in patch)
        for cells in product(choices, repeat=3):
            if math.prod(cells) < fewest:
                continue
            bare = Layout(_edges(cells), patch, apart, moved, stages, 1.0)
            windows.append(bare.window)
            layout = _magnified(bare, case_size, most_zoom)
            if layout.zoom <= most_zoom:
                found.append(layout)
        affordable = [layout for layout in found if math.prod(layout.cells + patch) <= most_voxels]
        if affordable:
            return max(affordable, key=lambda layout: (math.prod(layout.cells), -layout.zoom, layout.cells))
        if found:
            return min(found, key=lambda layout: (math.prod(layout.cells), layout.zoom))
    raise nothing_fits(title, f"{fewest} patches", strides, case_size, most_zoom, windows)


def _magnified(layout: Layout, case_size: Sequence[int], most_zoom: float) -> Layout:
    """The layout for cases of this size, with gaps that are kept though patches are moved."""
    apart, room = layout.gap, 0
    while True:
        zoom = magnification(layout.window, case_size)
        if moves(zoom) <= room or zoom > most_zoom:
            return replace(layout, zoom=zoom)
        room = moves(zoom)
        layout = replace(layout, gap=_edges(gap + room for gap in apart))


def nothing_fits(
    title: str,
    what: str,
    strides: Sequence[Sequence[int]],
    case_size: Sequence[int],
    most_zoom: float,
    windows: Sequence[Edges],
) -> UserError:
    """The error line of a solver that found no layout; ``windows`` would be, if cases were larger."""
    smallest = min((patch for _, patch in patch_sizes(strides)), default=None)
    least = f"of {smallest} voxels " if smallest else ""
    would = ""
    if windows:
        # one voxel of the case more along each axis: patches of a magnified window are moved
        needed = [math.ceil(edge / most_zoom) + 1 for edge in min(windows, key=math.prod)]
        would = f"; cases of {sized(needed)} would do"
    return UserError(
        f"{title} needs {what} {least}side by side, but cases of {tuple(case_size)} voxels hold none even magnified "
        f"{most_zoom:g} times{would}. Use larger cases, a higher zoom, or a method without patches (rotation, exemplar)"
    )


def sized(edges: Sequence[int]) -> str:
    """'16 x 32 x 32'."""
    return " x ".join(map(str, edges))


def _edges(values: Iterable[int]) -> Edges:
    depth, height, width = values
    return depth, height, width
