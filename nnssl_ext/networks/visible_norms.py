"""Instance norms over visible voxels.

Masked voxels are zero. They pull the mean and variance of an instance norm, so features of a masked image differ from
those of a whole one. Sparse convolutions avoid that (Wald et al., arXiv 2410.23132). Statistics of the visible voxels
alone are the cheap part of that remedy.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.errors import UserError


class VisibleNorms:
    """Let instance norms use visible voxels only.

    Args:
        network: Its instance norms are changed in place. Their names and parameters stay.

    Raises:
        UserError: If it has none.

    Attributes:
        mask: (B, 1, D, H, W) bool, True where voxels are visible. None uses all voxels.
    """

    def __init__(self, network: nn.Module) -> None:
        self.mask: Tensor | None = None
        norms = [module for module in network.modules() if isinstance(module, nn.InstanceNorm3d)]
        if not norms:
            raise UserError(
                f"masked_autoencoder.visible_norms: expected a network with instance norms, got "
                f"{type(network).__name__} without any. Set it to false."
            )
        for module in norms:
            module.__class__ = VisibleInstanceNorm3d
            object.__setattr__(module, "norms", self)


class VisibleInstanceNorm3d(nn.InstanceNorm3d):
    """Normalize by mean and variance of the visible voxels."""

    norms: VisibleNorms

    def forward(self, input: Tensor) -> Tensor:
        mask = self.norms.mask
        if mask is None:
            return super().forward(input)
        # a voxel of a coarse map is visible where any voxel below it is
        fine = mask.cpu() if mask.device.type == "mps" else mask  # MPS lacks the operator
        visible = F.adaptive_max_pool3d(fine.float(), input.shape[2:]).to(input.device)
        # a fully masked map would have no statistics
        visible = torch.where(visible.amax((2, 3, 4), keepdim=True) > 0, visible, torch.ones_like(visible))
        values, count = input.float(), visible.sum((2, 3, 4), keepdim=True)
        mean = (values * visible).sum((2, 3, 4), keepdim=True) / count
        variance = ((values - mean).square() * visible).sum((2, 3, 4), keepdim=True) / count
        result = (values - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            shape = (1, -1, 1, 1, 1)
            result = result * self.weight.float().view(shape) + self.bias.float().view(shape)
        return result.to(input.dtype)
