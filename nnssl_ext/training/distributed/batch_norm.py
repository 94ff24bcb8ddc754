"""Normalize over the global batch on any device.

torch's SyncBatchNorm needs GPUs.

B batch, C channel, any number of spatial axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnssl_ext.losses.gather import Sum


class GlobalBatchNorm(_BatchNorm):
    """Normalize with the statistics of all processes. Parameters, buffers and names are those of ``nn.BatchNorm3d``."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalize (B, C, ...). Processes may hold different B, or none."""
        if not self.training and self.running_mean is not None:
            return super().forward(image)
        axes = [0, *range(2, image.ndim)]
        shape = [1, -1] + [1] * (image.ndim - 2)
        values = image.to(torch.promote_types(image.dtype, torch.float32))
        count = values.new_full((1,), values.numel() / values.shape[1])
        total = Sum.apply(torch.cat([count, values.sum(axes)]))
        centered = values - (total[1:] / total[0]).view(shape)
        # a second pass: the mean square minus the squared mean would cancel
        variance = Sum.apply(centered.square().sum(axes)) / total[0]
        if self.training and self.running_mean is not None:
            self._remember(total[1:] / total[0], variance * total[0] / (total[0] - 1).clamp_min(1))
        result = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(image.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synchronize(module: nn.Module) -> nn.Module:
    """Make each batch norm in ``module`` a ``GlobalBatchNorm``. Parameters and buffers are kept."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = GlobalBatchNorm
    return module
