"""Corrupt crops as Models Genesis does.

Zhou et al., "Models Genesis", Medical Image Analysis 67:101840, 2021.

C channel, D H W voxels. Each function changes one image (C, D, H, W) in place. Draws come from the CPU, noise of
voxels from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.random import to_device

#: Points at which a Bezier curve is evaluated.
POINTS = 64


def bezier_curve(controls: np.ndarray, reversed_: bool) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate a monotonic cubic Bezier curve on [0, 1]: places (POINTS,) and values (POINTS,), places sorted.

    ``controls`` (2, 2) in [0, 1] are the two control points, between (0, 0) and (1, 1). Reversed values fall.
    """
    t = np.linspace(0, 1, POINTS)[:, None]
    points = 3 * (1 - t) ** 2 * t * controls[0] + 3 * (1 - t) * t**2 * controls[1] + t**3
    places, values = np.sort(points, axis=0).T
    return places, values[::-1].copy() if reversed_ else values


def map_intensities(image: Tensor, controls: np.ndarray, reversed_: bool) -> None:
    """Map each channel's intensities by a Bezier curve over their range."""
    places, values = (torch.from_numpy(line).float() for line in bezier_curve(controls, reversed_))
    # on an even grid the curve is looked up without a search
    even = torch.from_numpy(np.interp(np.linspace(0, 1, POINTS), places.numpy(), values.numpy())).float()
    even = to_device(even, image.device)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    place = (image - low) / span * (POINTS - 1)
    index = place.long().clamp(0, POINTS - 2)
    image.copy_(low + span * torch.lerp(even[index], even[index + 1], place - index))


def shuffle_locally(image: Tensor, corners: np.ndarray, edges: np.ndarray, generator: np.random.Generator) -> None:
    """Shuffle the voxels within each of N windows.

    All windows see the original image. One gather does all. ``corners`` and ``edges`` are (N, 3).
    """
    places = np.arange(image[0].numel(), dtype=np.int64).reshape(image.shape[1:])
    order = places.copy()
    for (z, y, x), (d, h, w) in zip(corners.tolist(), edges.tolist(), strict=True):
        window = (slice(z, z + d), slice(y, y + h), slice(x, x + w))
        order[window] = generator.permutation(places[window].ravel()).reshape(d, h, w)
    image.copy_(image.flatten(1)[:, to_device(torch.from_numpy(order.ravel()), image.device)].view_as(image))


def paint(image: Tensor, corners: np.ndarray, edges: np.ndarray, noise: Tensor, *, inside: bool) -> None:
    """Replace windows, or everything else, by noise."""
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    for (z, y, x), (d, h, w) in zip(corners.tolist(), edges.tolist(), strict=True):
        mask[z : z + d, y : y + h, x : x + w] = True
    mask = to_device(mask, image.device)
    image.copy_(torch.where(mask if inside else ~mask, noise, image))


def draw_windows(
    generator: np.random.Generator, size: Sequence[int], number: int, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw windows within an image: corners (N, 3) and edges (N, 3).

    A window's edge is between the shares ``low`` and ``high`` of the image's.
    """
    edges = np.maximum(1, np.rint(generator.uniform(low, high, (number, 3)) * size)).astype(int)
    corners = (generator.random((number, 3)) * (np.asarray(size) - edges + 1)).astype(int)
    return corners, edges
