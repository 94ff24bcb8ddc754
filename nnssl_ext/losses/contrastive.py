"""Contrastive losses: tell the right candidate from the others.

P predictions, K candidates, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(predictions: Tensor, candidates: Tensor, right: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) on cosine similarities.

    Args:
        predictions: (P, F).
        candidates: (K, F).
        right: (P,) the place of each prediction's own candidate.
        temperature: Divides the similarities.

    Returns:
        (P,); log K at chance.
    """
    return F.cross_entropy(similarities(predictions, candidates) / temperature, right, reduction="none")


def paired_bce(predictions: Tensor, candidates: Tensor, right: Tensor, draw: Tensor) -> Tensor:
    """Sigmoid cross-entropy of the right candidate and of one wrong one, by their scalar products.

    Args:
        predictions, candidates, right: As above.
        draw: (P,) in [0, 1), which of the wrong candidates.

    Returns:
        (P,); log 2 where nothing is known.
    """
    wrong = (draw * (len(candidates) - 1)).long().clamp_max(len(candidates) - 2)
    wrong = wrong + (wrong >= right)
    predictions, candidates = predictions.float(), candidates.float()
    yes = (predictions * candidates[right]).sum(1)
    no = (predictions * candidates[wrong]).sum(1)
    return (F.softplus(-yes) + F.softplus(no)) / 2


def similarities(predictions: Tensor, candidates: Tensor) -> Tensor:
    """Cosines (P, K)."""
    return products(F.normalize(predictions.float(), dim=1), F.normalize(candidates.float(), dim=1))


def products(predictions: Tensor, candidates: Tensor) -> Tensor:
    """Scalar products (P, K), in float32 under autocast, too."""
    with torch.autocast(predictions.device.type, enabled=False):
        return predictions.float() @ candidates.float().T


def hits(scores: Tensor, right: Tensor) -> Tensor:
    """(P, K), (P,) -> (P,) 1 where the right candidate scores highest; of n equals it is the first with 1 / n."""
    best = scores.amax(1, keepdim=True)
    top = scores == best
    return top.gather(1, right[:, None])[:, 0].float() / top.sum(1)


def within_sample(scores: Tensor, right: Tensor, sample: Tensor) -> Tensor:
    """``scores`` with the candidates of other samples at -inf; ``sample`` (K,) says whose a candidate is."""
    return scores.masked_fill(sample[right][:, None] != sample[None], -torch.inf)
