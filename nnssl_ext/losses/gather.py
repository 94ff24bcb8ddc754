"""The global batch in every process, with gradient, in the order of samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all processes in the order of ranks; backward, each process gets the sum of all gradients of its rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        context.counts = [int(count) for count in counts]
        # ranks may hold one sample more or less; what is gathered must have one shape
        padded = rows.new_zeros((max(context.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, context.counts, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        begin = sum(context.counts[: dist.get_rank()])
        return gradient[begin : begin + context.counts[dist.get_rank()]]


@torch.compiler.disable  # it asks other processes how many there are
def gather_samples(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the global batch, and where this process's rows are among them.

    Args:
        rows: (B, ...) of this process.
        index: (B,) global sample indices.

    Returns:
        (B of all processes, ...) in the order of sample indices, which no number of processes changes, and (B,).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        order = index.argsort()
        return rows[order], order.argsort()
    gathered: Tensor = _Gather.apply(rows)
    every: Tensor = _Gather.apply(index)
    order = every.argsort()
    return gathered[order], torch.searchsorted(every[order], index)
