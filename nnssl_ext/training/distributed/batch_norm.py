"""Normalize over the global batch on any device.

torch's SyncBatchNorm needs GPUs.

B batch, C channel, any number of spatial axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
        total = _Sum.apply(torch.cat([count, values.sum(axes)]))
        centered = values - (total[1:] / total[0]).view(shape)
        # a second pass: the mean square minus the squared mean would cancel
        variance = _Sum.apply(centered.square().sum(axes)) / total[0]
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


class _Sum(torch.autograd.Function):
    """Sum values over all processes, and gradients likewise."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def synchronize(module: nn.Module) -> nn.Module:
    """Replace each batch norm in ``module`` by a ``GlobalBatchNorm``. Parameters and buffers are kept."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
            norm = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            norm.weight, norm.bias, norm.training = child.weight, child.bias, child.training
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, norm)
        else:
            synchronize(child)
    return module
