"""A method as it is trained: compiled, wrapped for several processes, in mixed precision where the device has it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.methods import Method
from nnssl_ext.training.distributed import world


def engine(method: Method, device: torch.device, compile_it: bool) -> nn.Module:
    """The callable that a training step runs; its parameters are the method's own."""
    if world() > 1:
        # in place, so that the method keeps its parameters; batch statistics are those of the global batch
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    trained: nn.Module = method
    if compile_it:
        trained = torch.compile(method)  # type: ignore[assignment]
    if world() > 1:
        trained = DistributedDataParallel(trained, device_ids=[device.index] if device.type == "cuda" else None)
    return trained


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA that has it, else float16; float32 (None) elsewhere."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
