"""Define stochastic depth and a two-layer perceptron."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for random samples.

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016. Branches that are kept are scaled, so that their
    expectation stays the same.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        kept = 1 - self.probability
        mask = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(kept)
        return branch * (mask / kept if kept else mask)


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
