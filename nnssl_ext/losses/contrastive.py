"""Contrastive losses: find the right candidate among others.

P predictions, K candidates, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    predictions: Tensor, candidates: Tensor, right: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Compute InfoNCE on cosine similarities.

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748.

    Args:
        predictions: (P, F).
        candidates: (K, F).
        right: (P,) position of the right candidate of each prediction.
        temperature: Temperature of the softmax.
        excluded: (P, K) bool, candidates that do not count as negatives.

    Returns:
        (P,); log K at chance.
    """
    logits = similarities(predictions, candidates) / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(logits, right, reduction="none")


def paired_bce(
    predictions: Tensor, candidates: Tensor, right: Tensor, draw: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """Compute the cross-entropy of a right and a wrong candidate.

    Scores are scalar products.

    Args:
        predictions: (P, F).
        candidates: (K, F).
        right: (P,) position of the right candidate of each prediction.
        draw: (P,) in [0, 1), selects the wrong candidate.
        excluded: (P, K) bool, candidates that are never the wrong one. Each prediction needs one that is.

    Returns:
        (P,); log 2 at chance.
    """
    allowed = torch.arange(len(candidates), device=right.device) != right[:, None]  # (P, K)
    if excluded is not None:
        allowed = allowed & ~excluded
    number = allowed.sum(1)
    place = (draw * number).long().minimum(number - 1)  # among those that are allowed
    wrong = torch.searchsorted(allowed.cumsum(1, dtype=torch.int32), place[:, None].int() + 1)[:, 0]
    predictions, candidates = predictions.float(), candidates.float()
    yes = (predictions * candidates[right]).sum(1)
    no = (predictions * candidates[wrong]).sum(1)
    return (F.softplus(-yes) + F.softplus(no)) / 2


def similarities(predictions: Tensor, candidates: Tensor) -> Tensor:
    """Compute cosines, (P, K)."""
    return products(F.normalize(predictions.float(), dim=1), F.normalize(candidates.float(), dim=1))


def products(predictions: Tensor, candidates: Tensor) -> Tensor:
    """Compute scalar products (P, K) in float32, also under autocast."""
    with torch.autocast(predictions.device.type, enabled=False):
        return predictions.float() @ candidates.float().T


def hits(scores: Tensor, right: Tensor) -> Tensor:
    """Score 1 where the right candidate is best: (P, K), (P,) -> (P,).

    Among n candidates with the best score it counts 1 / n.
    """
    best = scores.amax(1, keepdim=True)
    top = scores == best
    return top.gather(1, right[:, None])[:, 0].float() / top.sum(1)


def within_sample(scores: Tensor, right: Tensor, sample: Tensor) -> Tensor:
    """Exclude other samples' candidates from ``scores`` (P, K).

    Args:
        scores: (P, K).
        right: (P,) position of the right candidate.
        sample: (K,) sample of each candidate.
    """
    return scores.masked_fill(sample[right][:, None] != sample[None], -torch.inf)
