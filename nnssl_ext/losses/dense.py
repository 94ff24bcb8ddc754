"""Dice and cross-entropy with an ignore label, per sample.

B batch, K classes, D H W voxels. Every value is per sample: any split of a batch over processes gives the same
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Target value of voxels that no loss and no measure counts.
IGNORE = 255
#: Keeps the Dice of an absent class defined.
SMOOTH = 1e-5
#: Spatial axes of (B, D, H, W) and of (B, K, D, H, W).
SPACE, CLASS_SPACE = (1, 2, 3), (2, 3, 4)


def dice_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the soft Dice loss and the cross-entropy of each sample.

    Dice is a mean over classes, the cross-entropy a mean over voxels, both in float32. This is the definition.
    ``losses.fused`` has the version that trains eagerly, with equal values and gradients.

    Args:
        logits: (B, K, D, H, W).
        target: (B, D, H, W) uint8, classes 0..K-1 or ``IGNORE``.

    Returns:
        Dice loss (B,) and cross-entropy (B,); both 0 for a sample without counted voxels.
    """
    counted = target != IGNORE  # (B, D, H, W)
    classes = torch.arange(logits.shape[1], device=logits.device, dtype=target.dtype).view(1, -1, 1, 1, 1)
    truth = target[:, None] == classes  # (B, K, D, H, W)
    voxels = counted.sum(SPACE)
    logs = logits.float().log_softmax(1)
    entropy = -torch.where(truth, logs, 0.0).sum((1, *CLASS_SPACE)) / voxels.clamp_min(1)

    probability = torch.where(counted[:, None], logs.exp(), 0.0)
    overlap = torch.where(truth, probability, 0.0).sum(CLASS_SPACE)  # (B, K)
    # a class that is neither there nor predicted counts as right: 0 / 0 -> 1
    score = (2 * overlap + SMOOTH) / (truth.sum(CLASS_SPACE) + probability.sum(CLASS_SPACE) + SMOOTH)
    return (1 - score.mean(1)) * (voxels > 0), entropy


def downsample_labels(target: Tensor, size: Sequence[int]) -> Tensor:
    """Resize labels to a coarser output by nearest neighbor: (B, D, H, W) uint8 -> (B, *size) uint8."""
    if tuple(target.shape[1:]) == tuple(size):
        return target
    return F.interpolate(target[:, None], size=tuple(size), mode="nearest-exact")[:, 0]


def deep_supervision_weights(outputs: int) -> list[float]:
    """Compute the weight of each output, finest first; they sum to 1.

    Weights halve from output to output. The coarsest one has none, as in nnU-Net.
    """
    weights = [0.5**i for i in range(outputs)]
    if outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def hard_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the Dice of the predicted classes, (B,).

    It is a mean over the classes 1..K-1 that are in the target or predicted. NaN where there is none.
    """
    prediction = logits.argmax(1).flatten(1)
    target = target.flatten(1)
    counted = target != IGNORE
    scores, present = [], []
    for k in range(1, logits.shape[1]):
        predicted, true = (prediction == k) & counted, target == k
        size = predicted.sum(1) + true.sum(1)
        scores.append(2 * (predicted & true).sum(1) / size.clamp_min(1))
        present.append(size > 0)
    there = torch.stack(present, 1)
    return (torch.stack(scores, 1) * there).sum(1) / there.sum(1)
