"""Find ranks and devices, and reduce values over processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl_ext.errors import UserError


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Return the world size, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_device(device: torch.device) -> torch.device:
    """Return the device of this rank. On CUDA it is the GPU of the local rank, otherwise ``device``."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank() % max(1, torch.cuda.device_count()))))


def check_nccl() -> None:
    """Refuse several GPUs if this torch has no NCCL."""
    if not (dist.is_available() and dist.is_nccl_available()):
        raise UserError("several GPUs need NCCL, which this torch lacks (Windows); use one GPU")


def mean_over_samples(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Average each term over all samples of all processes.

    Values that are not finite are left out: their batches changed nothing. If none is finite the mean is NaN.

    Args:
        outputs: Terms of each step, each (B,).
    """
    result = {}
    for key in outputs[0]:
        values = torch.cat([output[key].float() for output in outputs])
        values = (values.cpu() if values.device.type == "mps" else values).double()  # mps has no doubles
        finite = values[torch.isfinite(values)]
        total = torch.stack([finite.sum(), torch.full_like(finite.sum(), finite.numel())])
        if world() > 1:
            dist.all_reduce(total)
        result[key] = (total[0] / total[1]).item()
    return result


def same_everywhere(found: Any, fold: int | str) -> None:
    """Check that all processes find the same. Machines with separate results folders do not."""
    everywhere = [found] * world()
    if world() > 1:
        dist.all_gather_object(everywhere, found)
    if any(other != everywhere[0] for other in everywhere):
        raise UserError(
            f"the processes find different checkpoints of fold {fold}, in their order: {everywhere}. nnUNet_results "
            f"must be a folder that all machines share"
        )
