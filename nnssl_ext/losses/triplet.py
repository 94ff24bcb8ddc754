"""Triplet loss: an anchor is nearer to its positive than to negatives, by a margin.

A anchors, K candidates, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_distances(anchors: Tensor, candidates: Tensor) -> Tensor:
    """(A, F), (K, F) -> (A, K), in float32 under autocast, too: the differences of near vectors are small."""
    a, c = anchors.float(), candidates.float()
    with torch.autocast(a.device.type, enabled=False):
        return ((a**2).sum(1, keepdim=True) - 2 * a @ c.T + (c**2).sum(1)).clamp_min(0)


def semi_hard_triplet(anchors: Tensor, positives: Tensor, candidates: Tensor, allowed: Tensor, margin: float) -> Tensor:
    """Triplet loss with semi-hard negatives (Schroff et al., FaceNet, CVPR 2015).

    The negative is the nearest one that is farther than the positive; where none is, the farthest. With a single
    negative there is nothing to choose and it is the plain triplet loss.

    Args:
        anchors, positives: (A, F), on the unit sphere.
        candidates: (K, F).
        allowed: (A, K) bool, which candidates are negatives of which anchor; at least one each.
        margin: In squared distance.

    Returns:
        (A,); the margin where nothing is known.
    """
    near = ((anchors.float() - positives.float()) ** 2).sum(1)
    far = squared_distances(anchors, candidates)
    harder = allowed & (far > near[:, None])
    nearest = far.masked_fill(~harder, torch.inf).amin(1)
    farthest = far.masked_fill(~allowed, -torch.inf).amax(1)
    return F.relu(near - torch.where(harder.any(1), nearest, farthest) + margin)


def plain_triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """(A, F) three times -> (A,): squared distances, one given negative per anchor."""
    near = ((anchors.float() - positives.float()) ** 2).sum(1)
    far = ((anchors.float() - negatives.float()) ** 2).sum(1)
    return F.relu(near - far + margin)
