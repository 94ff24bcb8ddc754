"""Whether features have collapsed.

N samples, F features. Both centre the features first: a large common mean would hide a collapse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def feature_deviation(features: Tensor) -> Tensor:
    """Mean standard deviation of a feature over samples, (N, F) -> (): 0 when all samples look alike."""
    return features.float().std(0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """Directions in which samples differ, (N, F) -> (): exp of the entropy of the normalised singular values.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. At most min(N - 1, F); 0 when all samples are equal.
    """
    centred = features.float() - features.float().mean(0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    shares = values / total.clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return torch.where(total > 1e-6, entropy.exp(), torch.zeros_like(total))
