"""Reconstruction of voxels, per sample.

B batch, C channel, D H W voxels. Weights are 1 for voxels that count and 0 for others.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Blocks of lower variance show nothing to reconstruct.
MIN_VARIANCE = 1e-6
#: Least variance of which a share is given: a deviation of 0.1, in normalized intensities. Small errors are large
#: multiples of less, and one such image would outweigh all others in a mean.
MIN_EXPLAINED = 0.01


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Average the squared error over the voxels that count: (B, C, D, H, W) three times -> (B,)."""
    count = weight.sum((1, 2, 3, 4)).clamp_min(1)
    return ((prediction.float() - target) ** 2 * weight).sum((1, 2, 3, 4)) / count


def explained_variance(error: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Compute the share of the target's variance that is predicted: (B,).

    Predicting the mean of each channel scores 0, the target 1. NaN where the variance of the voxels that count is below
    ``MIN_EXPLAINED``, or where none counts.

    Args:
        error: (B,) mean squared error.
        target, weight: (B, C, D, H, W).
    """
    per_channel = weight.sum((2, 3, 4), keepdim=True).clamp_min(1)
    mean = (target * weight).sum((2, 3, 4), keepdim=True) / per_channel
    count = weight.sum((1, 2, 3, 4)).clamp_min(1)
    variance = ((target - mean) ** 2 * weight).sum((1, 2, 3, 4)) / count
    return torch.where(variance >= MIN_EXPLAINED, 1 - error / variance, torch.nan)
