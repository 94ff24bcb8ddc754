"""Dice and cross-entropy with an ignore label, per sample.

B batch, K classes, D H W voxels. Values are per sample, never per batch, so that any split of a batch over processes
gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Target value of voxels that no loss and no measure counts.
IGNORE = 255
#: Keeps the Dice of an absent class defined.
SMOOTH = 1e-5


@torch.compiler.disable  # compiled, its backward pass would run in autocast's type
def dice_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice loss (1 - Dice, mean over classes) and cross-entropy (mean over voxels), in float32.

    Args:
        logits: (B, K, D, H, W).
        target: (B, D, H, W) uint8, classes 0..K-1 or ``IGNORE``.

    Returns:
        Two tensors (B,); both 0 for a sample whose voxels are all ignored.
    """
    return _DiceCrossEntropy.apply(logits, target)


class _DiceCrossEntropy(torch.autograd.Function):
    """Both losses with their gradient written out: four passes over (B, K, V) instead of autograd's dozen, and one
    tensor of that size kept instead of five. V voxels; y is a voxel's label, p a probability, c whether it counts."""

    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target = target.flatten(1)  # (B, V)
        counted = target != IGNORE
        label = torch.where(counted, target, 0).long()
        voxels = counted.sum(1)
        probability = F.log_softmax(logits.float(), 1).flatten(2)  # (B, K, V)
        entropy = -(probability.gather(1, label[:, None])[:, 0] * counted).sum(1) / voxels.clamp_min(1)
        probability.exp_().mul_(counted[:, None])
        chosen = probability.gather(1, label[:, None])[:, 0]  # (B, V)

        # sums over a million voxels want double; sums per class of one value a voxel need no (B, K, V) copies
        double = torch.float32 if logits.device.type == "mps" else torch.float64
        none = torch.zeros(logits.shape[:2], dtype=double, device=logits.device)  # (B, K)
        overlap = none.scatter_add(1, label, chosen.to(double))
        true = torch.stack([(target == k).sum(1) for k in range(logits.shape[1])], 1)
        # a class that is neither there nor predicted counts as right: 0 / 0 -> 1
        above, below = 2 * overlap + SMOOTH, true + probability.sum(2) + SMOOTH
        dice = (1 - (above / below).mean(1)) * (voxels > 0)

        own, every = -2 / below / logits.shape[1], above / below**2 / logits.shape[1]
        context.save_for_backward(probability, chosen, label, counted, voxels, own.float(), every.float())
        context.shape, context.dtype = logits.shape, logits.dtype
        return dice.to(entropy.dtype), entropy

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # the Dice loss falls with p of class k by c (own_k [k = y] + every_k), the entropy with log p of y by c / V;
        # through the softmax: p_k (d_k - sum_j p_j d_j), and c (p_k - [k = y]) / V
        probability, chosen, label, counted, voxels, own, every = context.saved_tensors
        dice = gradients[0][:, None] * counted  # (B, V)
        entropy = (gradients[1] / voxels.clamp_min(1))[:, None] * counted
        mine = own.gather(1, label) * chosen
        mean = mine + torch.einsum("bkv,bk->bv", probability, every)
        result = torch.addcmul((entropy - dice * mean)[:, None], dice[:, None], every[:, :, None]).mul_(probability)
        result.scatter_add_(1, label[:, None], (dice * mine - entropy)[:, None])
        return result.view(context.shape).to(context.dtype), None


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
