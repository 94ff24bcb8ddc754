"""Gather the global batch in every process, with gradient.

B samples of this process, G samples of all processes. With W processes, rank r holds the samples r, r + W, r + 2 W, ...
of the global batch. So all counts are known, and no process waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Sum(torch.autograd.Function):
    """Sum values over all processes, and gradients likewise."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return Sum.forward(context, gradients[0])


@torch.compiler.disable  # it communicates
def gather_samples(rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Gather the rows of the global batch.

    Args:
        rows: (B, ...) rows of this process.
        total: G. Not used by a single process, which has them all.

    Returns:
        (G, ...) in the order of samples, which the number of processes does not change; and (B,) the positions of this
        process's rows in it.

    Raises:
        ValueError: If ``rows`` are not this process's share of ``total``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, torch.arange(len(rows), device=rows.device)
    own = torch.arange(dist.get_rank(), total, dist.get_world_size(), device=rows.device)
    if len(own) != len(rows):
        raise ValueError(f"Expected {len(own)} of {total} samples on rank {dist.get_rank()}, got {len(rows)}.")
    return Sum.apply(rows.new_zeros(total, *rows.shape[1:]).index_copy(0, own, rows)), own
