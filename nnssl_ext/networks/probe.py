"""How much of a task the spacing alone gives away.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnssl_ext.networks.heads import layers


def roughness(image: Tensor) -> Tensor:
    """How much neighbours differ along each axis, (B, C, D, H, W) -> (B, 3): logarithms, zero in the mean over axes.

    An axis with thick slices is rough, a blurred one smooth; nothing of what the image shows is kept.
    """
    steps = [image.diff(dim=axis).abs().mean((1, 2, 3, 4)) for axis in (2, 3, 4)]
    logarithms = torch.stack(steps, 1).clamp_min(1e-6).log()
    return logarithms - logarithms.mean(1, keepdim=True)


class SpacingProbe(nn.Module):
    """A small classifier that sees the roughness alone; it teaches the encoder nothing.

    Args:
        classes: Number of classes of the task it is held against.
    """

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers([3, 32, classes]))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, classes)."""
        return self.layers(roughness(image.detach().float()))
