"""Work around wrong weight gradients of oneDNN in bfloat16."""

from __future__ import annotations

import torch
from torch import nn


class TwoSliceConv3d(nn.Conv3d):
    """Convolve maps of two slices with correct weight gradients.

    The bug: where a kernel of three slides along an axis of two slices, oneDNN 3.13 (in torch 2.15) computes the
    gradient of the weights from memory that was never written. The error is as large as the gradient and not always
    finite. Such maps are small, so float32 costs nothing here.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if input.shape[2] != 2 or self.kernel_size[0] == 1 or not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return super().forward(input.float()).to(dtype)


def avoid_two_slice_bug(network: nn.Module, device: torch.device, precision: torch.dtype | None) -> None:
    """Turn convolutions into ``TwoSliceConv3d`` on CPUs in bfloat16. Parameters and names stay."""
    if device.type == "cpu" and precision is torch.bfloat16:
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = TwoSliceConv3d
