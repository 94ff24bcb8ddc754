"""Compile and wrap a method, and choose its precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.training.distributed.batch_norm import synchronize
from nnssl_ext.training.distributed.ranks import world


def wrap_for_training(method: Method, device: torch.device, compiled: bool) -> nn.Module:
    """Return the callable of a training step. Its parameters are the method's own."""
    if world() > 1:
        # in place, so that the method keeps its parameters; batch statistics are those of the global batch
        (nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else synchronize)(method)
    trained: nn.Module = method
    if compiled:
        if world() > 1:
            # it splits graphs between gradient buckets, which older torch cannot do around an autograd.Function
            torch._dynamo.config.optimize_ddp = False
        trained = torch.compile(method)  # type: ignore[assignment]
    if world() > 1:
        # every process computes the same buffers: statistics and centers are those of the global batch
        devices = [device.index] if device.type == "cuda" else None
        trained = DistributedDataParallel(trained, device_ids=devices, broadcast_buffers=False)
    return trained


def set_memory_format(
    network: nn.Module, memory_format: str, device: torch.device, precision: torch.dtype | None
) -> None:
    """Set the memory format of convolution weights.

    Values are equal in either format, up to rounding.

    Call this before the optimizer is made and the network is wrapped for DDP.

    Args:
        network: Module with the convolutions.
        memory_format: ``contiguous``, ``channels_last``, or ``auto``, which is the faster one.
        device: Device of the training.
        precision: Type of autocast; None is float32.
    """
    faster = device.type == "cpu" and precision is torch.bfloat16
    if memory_format == "contiguous" or (memory_format == "auto" and not faster):
        return
    for module in network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give optimizer state the memory format of its weights. Fused optimizers read both in memory order."""
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def mixed_precision(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """Return the dtype for autocast. None is float32.

    ``auto``: bfloat16 on GPUs and CPUs that compute in it, float16 on other GPUs, else float32. ``stock``: as nnU-Net,
    float16 on GPUs, else float32.

    Raises:
        UserError: For float16 on anything but a GPU.
    """
    if precision == "float16" and device.type != "cuda":
        raise UserError(f"precision float16 needs a GPU, the device is {device.type}. Use auto")
    if precision == "stock":
        precision = "float16" if device.type == "cuda" else "float32"
    if precision != "auto":
        return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float16
    # other CPUs take bfloat16 too, but are slower with it
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else None


def arithmetic(precision: torch.dtype | None) -> str:
    """Return the name of an autocast dtype, such as bfloat16. None is float32."""
    return str(precision or torch.float32).removeprefix("torch.")


def note_other_arithmetic(stored: str | None, precision: torch.dtype | None, log: Callable[[str], None]) -> None:
    """Log that a run continues in another arithmetic than its checkpoint names. Older ones name none."""
    if stored not in (None, arithmetic(precision)):
        log(f"note: the steps so far were computed in {stored}, the next ones are in {arithmetic(precision)}")


def computes_in_bfloat16(device: torch.device | None = None) -> bool:
    """Check that a GPU computes in bfloat16. torch's own check counts those that only emulate it."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


def _cpu_has_bfloat16() -> bool:
    # others emulate it slowly; older releases of torch cannot tell
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
