"""What has been seen so far, summed up in one vector.

B batch, R rows, Q patches of a row, E embedding, H width of the summary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentContext(nn.Module):
    """A GRU over patches, row by row: (B, R, Q, E) -> (B, H)."""

    def __init__(self, *, embedding: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(embedding, width, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        # a recurrence over a handful of patches costs nothing, and float32 is the one type that every device has
        with torch.autocast(rows.device.type, enabled=False):
            return self.gru(rows.float().flatten(1, 2))[0][:, -1]


class ConvolutionalContext(nn.Module):
    """Convolutions along rows that look back only, read at the last row: (B, R, Q, E) -> (B, H)."""

    def __init__(self, *, columns: int, embedding: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConstantPad1d((1, 0), 0.0),
            nn.Conv1d(columns * embedding, width, 2),
            nn.GELU(),
            nn.ConstantPad1d((1, 0), 0.0),
            nn.Conv1d(width, width, 2),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows.flatten(2).transpose(1, 2))[..., -1]
