"""Variance-invariance-covariance regularization, which needs no negatives.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022, arXiv
2105.04906.

B pairs of this process, N embeddings of the global batch, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Published weights of the three terms.
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0


def vicreg(first: Tensor, second: Tensor, everything: Tensor) -> Tensor:
    """Pull the views of a pair together while features keep their deviation and stay uncorrelated.

    Args:
        first: (B, F), not normalized.
        second: (B, F), the other views.
        everything: (N, F), N at least 2, embeddings of the global batch. Variance and covariance are taken over them,
            and each counts twice: the published loss sums them over both views.

    Returns:
        (B,). The last two terms are equal for all pairs.
    """
    first, second, everything = first.float(), second.float(), everything.float()
    with torch.autocast(first.device.type, enabled=False):
        invariance = ((first - second) ** 2).mean(1)
        centered = everything - everything.mean(0)
        deviation = (centered.square().sum(0) / (len(everything) - 1) + 1e-4).sqrt()
        covariance = centered.T @ centered / (len(everything) - 1)
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        spread = VARIANCE * F.relu(1 - deviation).mean() + COVARIANCE * off_diagonal / everything.shape[1]
        return INVARIANCE * invariance + 2 * spread
