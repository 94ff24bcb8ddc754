"""Bring anchors nearer to positives than to negatives.

A anchors, K candidates, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_distances(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Compute squared distances, (A, F), (K, F) -> (A, K).

    They are in float32 also under autocast: the differences of near vectors are small.
    """
    a, c = anchors.float(), candidates.float()
    with torch.autocast(a.device.type, enabled=False):
        return ((a**2).sum(1, keepdim=True) - 2 * a @ c.T + (c**2).sum(1)).clamp_min(0)


def semi_hard_triplet(anchors: Tensor, positives: Tensor, candidates: Tensor, allowed: Tensor, margin: float) -> Tensor:
    """Compute the triplet loss with semi-hard negatives.

    Schroff et al., "FaceNet", CVPR 2015, arXiv 1503.03832. The negative is the nearest candidate that is farther than
    the positive. If none is farther, it is the farthest candidate. With one candidate this is the plain triplet loss.

    Args:
        anchors: (A, F), on the unit sphere.
        positives: (A, F), on the unit sphere.
        candidates: (K, F).
        allowed: (A, K) bool, whether a candidate is a negative of an anchor. Each anchor needs one.
        margin: Margin between squared distances.

    Returns:
        (A,); the margin at chance.
    """
    near = ((anchors.float() - positives.float()) ** 2).sum(1)
    far = squared_distances(anchors, candidates)
    harder = allowed & (far > near[:, None])
    nearest = far.masked_fill(~harder, torch.inf).amin(1)
    farthest = far.masked_fill(~allowed, -torch.inf).amax(1)
    return F.relu(near - torch.where(harder.any(1), nearest, farthest) + margin)


def plain_triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Compute the triplet loss of given negatives.

    Args:
        anchors: (A, F).
        positives: (A, F).
        negatives: (A, F).
        margin: Margin between squared distances.

    Returns:
        (A,).
    """
    near = ((anchors.float() - positives.float()) ** 2).sum(1)
    far = ((anchors.float() - negatives.float()) ** 2).sum(1)
    return F.relu(near - far + margin)
