"""What a process needs to know of the others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_device(device: torch.device) -> torch.device:
    """This process's device: on CUDA the one of its rank on this machine, otherwise ``device``."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank() % max(1, torch.cuda.device_count()))))


def mean_over_samples(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each term over all samples of all steps of all processes; each term (B,) a step.

    Values that are not finite do not count: their batches changed nothing. Without any other the mean is NaN.
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
