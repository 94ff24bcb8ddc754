"""Whether features have collapsed.

N samples, F features, K prototypes. Deviation and rank centre the features first: a large common mean would hide a
collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_deviation(features: Tensor) -> Tensor:
    """Mean standard deviation of a feature over samples, (N, F) -> (): 0 when all samples look alike."""
    return features.float().std(0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """Directions in which samples differ, (N, F) -> (): exp of the entropy of the normalised singular values.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. At most min(N - 1, F); 0 when all samples are equal,
    NaN when a feature is not finite.
    """
    centred = features.float() - features.float().mean(0)
    values = torch.linalg.svdvals(centred.nan_to_num(0.0, 0.0, 0.0))
    total = values.sum()
    shares = values / total.clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    rank = torch.where(total > 1e-6, entropy.exp(), torch.zeros_like(total))
    return torch.where(centred.isfinite().all(), rank, torch.nan)


def off_diagonal_cosine(features: Tensor) -> Tensor:
    """Mean cosine of the features of two different samples, (N, F) -> (): 1 when all point the same way."""
    unit = F.normalize(features.float(), dim=1)
    number = len(unit)
    similar = unit @ unit.T
    return (similar.sum() - similar.diagonal().sum()) / max(1, number * (number - 1))


def retrieval_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """How often a sample's first view is nearest to its own second view among all second views: 2 x (N, F) -> ().

    Nearest by the cosine of centred features. Chance is 1 / N.
    """
    centred = [F.normalize((view - view.mean(0)).float(), dim=1) for view in (first, second)]
    nearest = (centred[0] @ centred[1].T).argmax(1)
    return (nearest == torch.arange(len(first), device=first.device)).float().mean()


def entropies(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean entropy of distributions as a share of log K, and the information in nats that a target has on its sample.

    The information is the entropy of the mean minus the mean entropy: 0 when all samples have the same target, be it
    one prototype or all of them, and at most log N.

    Args:
        pieces: (n, K) each, of N samples together.
    """

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    number, each, every = 0, torch.zeros(()), torch.zeros(())
    for piece in pieces:
        distributions = piece.float()
        number += len(piece)
        each = each.to(piece.device) + entropy(distributions).sum()
        every = every.to(piece.device) + distributions.sum(0)
    each = each / number
    return each / math.log(every.numel()), entropy(every / number) - each
