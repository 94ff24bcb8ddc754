"""Define stochastic depth and a two-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Samples are left out of a branch where their whole number is this close to the probability.
TOLERANCE = 1 / 16


class DropPath(nn.Module):
    """Add a residual branch, without some samples in training.

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016. Branches that are kept are scaled, so that their
    expectation stays the same.

    In a batch of enough samples as many are left out as the probability says, and cost nothing, as in DINOv2 (Oquab et
    al., TMLR 2024). In a smaller one each is dropped by its own draw, after the branch.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, features: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``features`` (B, ...) plus ``branch`` of them. The branch treats samples separately."""
        if not self.training or self.probability == 0:
            return features + branch(features)
        samples, share = len(features), 1 - self.probability
        kept = round(samples * share)
        if not 0 < kept < samples or abs(kept / samples - share) > TOLERANCE:
            mask = features.new_empty(samples, *[1] * (features.ndim - 1)).bernoulli_(share)
            return features + branch(features) * (mask / share if share else mask)
        rows = torch.randperm(samples, device=features.device)[:kept]
        added = branch(features.index_select(0, rows)).to(features.dtype)
        return features.index_add(0, rows, added, alpha=samples / kept)


class Mlp(nn.Module):
    """Apply two linear layers with a GELU between them: (..., E) -> (..., E)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(features)))))
