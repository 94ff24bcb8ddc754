"""Fit one tensor to another shape, by pure functions.

Each keeps a response, which its docstring names.

O output and I input channels, k kernel edges, N tokens, E width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class MisfitError(ValueError):
    """Report a change of shape without a rule."""


def input_channels(weight: Tensor, channels: int) -> Tensor:
    """Fit a first layer to other channels: (O, I, *k) -> (O, channels, *k).

    More channels repeat the source's in turn, each divided by the number of its repetitions. Fewer take the mean of
    all, multiplied by I / channels. An image whose channels are all alike then gives the same response.
    """
    present = weight.shape[1]
    if channels < present:
        return (weight.mean(1, keepdim=True) * (present / channels)).expand(-1, channels, *weight.shape[2:]).clone()
    turn = torch.arange(channels) % present
    shares = torch.bincount(turn, minlength=present).to(weight.dtype)[turn]
    return weight[:, turn] / shares.view(1, -1, *[1] * (weight.ndim - 2))


def kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Fit a convolution's kernel axis by axis: (O, I, *k) -> (O, I, *size).

    To one voxel the kernel is summed. From one voxel it is placed at the center of zeros. A volume that is constant
    along that axis then gives the same response (where no padding is seen).

    Raises:
        MisfitError: If an axis goes from one edge over 1 to another, or to an even one.
    """
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old == new:
            continue
        if new == 1:
            weight = weight.sum(axis, keepdim=True)
        elif old == 1 and new % 2:
            around = [0] * (2 * weight.ndim)
            place = 2 * (weight.ndim - 1 - axis)  # F.pad counts from the last axis
            around[place] = around[place + 1] = new // 2
            weight = F.pad(weight, around)
        else:
            raise MisfitError(f"no rule for a kernel edge {old} -> {new}")
    return weight


def upsampling_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Fit a transposed convolution: (I, O, *k) -> (I, O, *size).

    Its kernel is its stride.

    The kernel's mean along the axis is repeated. A constant map is then brought to the same mean.
    """
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old != new:
            edges = [new if a == axis else -1 for a in range(weight.ndim)]
            weight = weight.mean(axis, keepdim=True).expand(*edges)
    return weight.clone()


def overlapping_channels(weight: Tensor, initial: Tensor, parts: int = 1) -> Tensor:
    """Copy the channels of ``weight`` over ``initial``.

    The other axes must be alike.

    Args:
        weight: (A, B, ...) or (A,).
        initial: The same number of axes.
        parts: Number of equal parts of the input channels (axis 1), which overlap separately: a decoder's convolution
            sees the up-sampled map and the skip.
    """
    result = initial.clone()
    first = min(weight.shape[0], initial.shape[0])
    if weight.ndim == 1:
        result[:first] = weight[:first]
        return result
    for old, new in zip(weight.chunk(parts, 1), result.chunk(parts, 1), strict=True):
        second = min(old.shape[1], new.shape[1])
        new[:first, :second] = old[:first, :second]
    return result


def patch_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Fit a patch embedding: (E, I, *k) -> (E, I, *size).

    Pseudo-inverse resize (Beyer et al., FlexiViT, arXiv 2212.08013), one axis after the other. The token of a patch is
    kept when the patch is resized with the volume: exactly when it grows, in least squares when it shrinks.
    """
    result = weight.double()
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old != new:
            back = torch.linalg.pinv(resizing_matrix(old, new)).T  # (new, old)
            result = torch.tensordot(result, back, dims=([axis], [1])).movedim(-1, axis)
    return result.to(weight.dtype).contiguous()


def resizing_matrix(old: int, new: int) -> Tensor:
    """Compute the matrix that resizes a line: (new, old).

    Linear interpolation when it grows. The mean over the voxels that a new one covers when it shrinks.
    """
    if new >= old:
        lines = torch.eye(old, dtype=torch.float64)[None]  # (1, old lines, old voxels)
        return F.interpolate(lines, size=new, mode="linear", align_corners=False)[0].T
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    voxels = torch.arange(old, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], voxels + 1) - torch.maximum(edges[:-1, None], voxels)
    return covered.clamp(min=0) * new / old
