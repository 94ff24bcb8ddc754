"""Dice and cross-entropy with an ignore label, per sample.

B batch, K classes, D H W voxels. Values are per sample, never per batch, so that any split of a batch over processes
gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Target value of voxels that no loss and no measure counts.
IGNORE = 255


def dice_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice loss (1 - Dice, mean over classes) and cross-entropy (mean over voxels).

    Args:
        logits: (B, K, D, H, W).
        target: (B, D, H, W) uint8, classes 0..K-1 or ``IGNORE``.

    Returns:
        Two tensors (B,); both 0 for a sample whose voxels are all ignored.
    """
    log_probability = F.log_softmax(logits.float(), 1).flatten(2)  # (B, K, V)
    target = target.flatten(1).long()  # (B, V)
    counted = target != IGNORE
    label = torch.where(counted, target, 0)
    voxels = counted.sum(1)
    chosen = log_probability.gather(1, label[:, None])[:, 0]  # (B, V)
    cross_entropy = -(chosen * counted).sum(1) / voxels.clamp_min(1)

    # sums over a million voxels want double; sums per class of one value a voxel need no (B, K, V) copies
    double = torch.float32 if logits.device.type == "mps" else torch.float64
    none = torch.zeros(logits.shape[:2], dtype=double, device=logits.device)  # (B, K)
    overlap = none.scatter_add(1, label, (chosen.exp() * counted).to(double))
    true = none.scatter_add(1, label, counted.to(double))
    predicted = torch.einsum("bkv,bv->bk", log_probability.exp(), counted.to(log_probability.dtype))
    # a class that is neither there nor predicted counts as right: 0 / 0 -> 1
    dice = (2 * overlap + 1e-5) / (true + predicted + 1e-5)
    return ((1 - dice.mean(1)) * (voxels > 0)).to(cross_entropy.dtype), cross_entropy


def downsample_labels(target: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour labels of a coarser output: (B, D, H, W) uint8 -> (B, *size) uint8."""
    if tuple(target.shape[1:]) == tuple(size):
        return target
    return F.interpolate(target[:, None], size=tuple(size), mode="nearest-exact")[:, 0]


def deep_supervision_weights(outputs: int) -> list[float]:
    """1, 1/2, 1/4, ... over the outputs, the coarsest one left out as in nnU-Net, normalised to sum to 1."""
    weights = [0.5**i for i in range(outputs)]
    if outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def hard_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of the arg max, mean over the classes 1..K-1 that are in the target or predicted: (B,)."""
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
    return (torch.stack(scores, 1) * there).sum(1) / there.sum(1).clamp_min(1)
