"""Measures of feature collapse.

N samples, F features, K prototypes. The effective rank is that of centered features: a large common mean would hide a
collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_deviation(features: Tensor) -> Tensor:
    """Compute features' mean deviation over samples, (N, F) -> ()."""
    return features.float().std(0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """Compute the effective rank of features, (N, F) -> ().

    Roy and Vetterli, "The effective rank", EUSIPCO 2007: exp of the entropy of the normalized singular values. It is
    at most min(N - 1, F), 0 when all samples are equal, and NaN when a feature is not finite.
    """
    centered = features.float() - features.float().mean(0)
    values = torch.linalg.svdvals(centered.nan_to_num(0.0, 0.0, 0.0))
    total = values.sum()
    shares = values / total.clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    rank = torch.where(total > 1e-6, entropy.exp(), torch.zeros_like(total))
    return torch.where(centered.isfinite().all(), rank, torch.nan)


def off_diagonal_cosine(features: Tensor) -> Tensor:
    """Compute the mean cosine between different samples, (N, F) -> ()."""
    unit = F.normalize(features.float(), dim=1)
    number = len(unit)
    similar = unit @ unit.T
    return (similar.sum() - similar.diagonal().sum()) / max(1, number * (number - 1))


def retrieval_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """Retrieve each sample's second view by its first, 2 x (N, F) -> ().

    The nearest view has the largest cosine of centered features. Returns the accuracy; chance is 1 / N.
    """
    centered = [F.normalize((view - view.mean(0)).float(), dim=1) for view in (first, second)]
    nearest = (centered[0] @ centered[1].T).argmax(1)
    return (nearest == torch.arange(len(first), device=first.device)).float().mean()


def entropies(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the mean entropy of targets and their information.

    The entropy is a share of log K. The information, in nats, is the entropy of the mean target minus the mean entropy.
    It is at most log N, and 0 when all samples have the same target, sharp or uniform.

    Args:
        chunks: Distributions (n, K) of N samples together.
    """

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    number, each, every = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        distributions = chunk.float()
        number += len(chunk)
        each = each.to(chunk.device) + entropy(distributions).sum()
        every = every.to(chunk.device) + distributions.sum(0)
    each = each / number
    return each / math.log(every.numel()), entropy(every / number) - each
