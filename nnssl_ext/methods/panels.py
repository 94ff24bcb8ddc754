"""Panels of a pretext picture: plain data, drawn elsewhere.

N patches or tokens, C channel, D H W voxels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.networks.base import Triple, triple

#: Least range of a component: tokens that are all alike have one color.
MIN_RANGE = 1e-6


@dataclass(frozen=True)
class Panel:
    """One image of a pretext picture.

    Attributes:
        title: Text above it, of one or two lines.
        data: A volume (D, H, W), of which three planes are drawn, or a slice (H, W). NaN is empty. Colors come first.
        kind: ``image``, ``levels`` (whole numbers), or ``colors`` (red, green and blue in [0, 1]).
        center: Voxel in all three planes of a volume. None is the middle.
    """

    title: str
    data: Tensor
    kind: str = "image"
    center: Triple | None = None


def axial(patches: Tensor) -> Tensor:
    """Take the first channel of the middle slice: (..., C, D, H, W) -> (..., H, W)."""
    return patches[..., 0, patches.shape[-3] // 2, :, :]


def assemble(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Place patches in a grid, with one empty voxel between neighbors.

    (N, D, H, W) in the order of the ``grid``, whose product is N -> (grid D * (D + 1) - 1, ...).
    """
    padded = F.pad(patches.float(), (0, 1) * 3, value=torch.nan).unflatten(0, tuple(grid))
    edges = [n * edge for n, edge in zip(grid, padded.shape[3:], strict=True)]
    return padded.permute(0, 3, 1, 4, 2, 5).reshape(edges)[:-1, :-1, :-1]


def assembled_center(patch: Sequence[int], grid: Sequence[int]) -> Triple:
    """Return the middle voxel of the grid's middle patch after ``assemble``."""
    return triple(n // 2 * (edge + 1) + edge // 2 for n, edge in zip(grid, patch, strict=True))


def principal_colors(reference: Tensor, *others: Tensor) -> list[Tensor]:
    """Color tokens by the first three principal components of ``reference``.

    It defines components and range of all: (..., F) -> (3, ...) in [0, 1] each. Components beyond F are 0.
    """
    rows = reference.detach().float().cpu().flatten(0, -2)
    mean = rows.mean(0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))  # ascending
    basis = vectors.flip(1)[:, :3]
    # the sign of a component is arbitrary: its longest entry is positive
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    low, high = ((rows - mean) @ basis).quantile(torch.tensor([0.02, 0.98]), 0)

    def colored(tokens: Tensor) -> Tensor:
        values = (tokens.detach().float().cpu() - mean) @ basis
        values = ((values - low) / (high - low).clamp_min(MIN_RANGE)).clamp(0, 1)
        return F.pad(values, (0, 3 - values.shape[-1])).movedim(-1, 0)

    return [colored(tokens) for tokens in (reference, *others)]
