"""Context networks of contrastive predictive coding.

B batch, R rows, Q patches of a row, E embedding, H context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentContext(nn.Module):
    """Run a GRU over patches, row by row: (B, R, Q, E) -> (B, H)."""

    def __init__(self, *, embedding_dim: int, context_dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(embedding_dim, context_dim, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        # a recurrence over a handful of patches costs nothing, and every device supports it in float32
        with torch.autocast(rows.device.type, enabled=False):
            return self.gru(rows.float().flatten(1, 2))[0][:, -1]


class ConvolutionalContext(nn.Module):
    """Run causal convolutions along rows and read the last row: (B, R, Q, E) -> (B, H). It sees all R rows."""

    def __init__(self, *, rows: int, columns: int, embedding_dim: int, context_dim: int) -> None:
        super().__init__()
        length = max(2, rows - 1)
        self.layers = nn.Sequential(
            nn.ConstantPad1d((1, 0), 0.0),
            nn.Conv1d(columns * embedding_dim, context_dim, 2),
            nn.GELU(),
            nn.ConstantPad1d((length - 1, 0), 0.0),
            nn.Conv1d(context_dim, context_dim, length),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows.flatten(2).transpose(1, 2))[..., -1]
