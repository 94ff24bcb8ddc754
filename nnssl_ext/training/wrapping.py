"""A method as it is trained: compiled, wrapped for several processes, in mixed precision where the device has it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.training.distributed.batch_norm import synchronise
from nnssl_ext.training.distributed.ranks import world


def engine(method: Method, device: torch.device, compile_it: bool) -> nn.Module:
    """The callable that a training step runs; its parameters are the method's own."""
    if world() > 1:
        # in place, so that the method keeps its parameters; batch statistics are those of the global batch
        (nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else synchronise)(method)
    trained: nn.Module = method
    if compile_it:
        if world() > 1:
            # it splits graphs between gradient buckets, which older torch cannot do around an autograd.Function
            torch._dynamo.config.optimize_ddp = False
        trained = torch.compile(method)  # type: ignore[assignment]
    if world() > 1:
        trained = DistributedDataParallel(trained, device_ids=[device.index] if device.type == "cuda" else None)
    return trained


class TwoSliceConv3d(nn.Conv3d):
    """A convolution whose gradient is right on CPUs in bfloat16 for maps of two slices, too.

    Where a kernel of three slides along two slices, oneDNN (3.13, in torch 2.15) computes the gradient of its weights
    from memory that was never written: wrong by as much as it is large, and not always finite. Such maps are small, so
    float32 costs nothing.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if input.shape[2] != 2 or self.kernel_size[0] == 1 or not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return super().forward(input.float()).to(dtype)


def right_in_bfloat16(network: nn.Module, device: torch.device, precision: torch.dtype | None) -> None:
    """Make a network's convolutions ``TwoSliceConv3d`` where that matters: same parameters, same names."""
    if device.type == "cpu" and precision is torch.bfloat16:
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = TwoSliceConv3d


def arrange(method: Method, memory_format: str, device: torch.device, precision: torch.dtype | None) -> None:
    """Make convolutions right in bfloat16, and lay their weights out in memory as the setting says.

    Before the optimiser is made and the method wrapped. Values are the same in either format, up to rounding.
    """
    right_in_bfloat16(method, device, precision)
    faster = device.type == "cpu" and precision is torch.bfloat16
    if memory_format == "contiguous" or (memory_format == "auto" and not faster):
        return
    for module in method.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def lay_out_as_weights(optimiser: torch.optim.Optimizer) -> None:
    """Averages of a loaded state in their weights' memory format: fused optimisers go through both as they lie."""
    for weight, values in optimiser.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def mixed_precision(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The type for autocast; None is float32.

    ``auto``: bfloat16 on GPUs and CPUs that compute in it, float16 on other GPUs, else float32.

    Raises:
        UserError: For float16 on anything but a GPU.
    """
    if precision == "float16" and device.type != "cuda":
        raise UserError(f"precision float16 needs a GPU, the device is {device.type}; use auto")
    if precision != "auto":
        return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float16
    # other CPUs take bfloat16 too, but are slower with it
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else None


def computes_in_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a GPU computes in bfloat16; torch's own answer counts those that only emulate it."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


def _cpu_has_bfloat16() -> bool:
    # matrix units for it; older releases of torch cannot tell
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
