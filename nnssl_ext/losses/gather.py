"""Gather the global batch in every process, with gradient.

B samples of this process, G samples of all processes. With W processes, rank r holds the samples r, r + W, r + 2 W, ...
of the global batch. So all counts are known, and no process waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Gather rows of all ranks, and sum their gradients."""

    @staticmethod
    def forward(context: Any, rows: Tensor, total: int) -> Tensor:
        world = dist.get_world_size()
        # ranks may differ by one sample, and gathered tensors need one shape
        padded = rows.new_zeros((-(-total // world), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded)
        # row k of rank r is sample r + k W, so that all padding is at the end
        return torch.stack(gathered, 1).flatten(0, 1)[:total]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() :: dist.get_world_size()], None


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
    return _Gather.apply(rows, total), own
