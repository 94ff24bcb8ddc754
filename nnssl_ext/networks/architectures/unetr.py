"""Define UNETR's decoder of token maps.

Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022, arXiv 2103.10504.

B batch, C channel, D H W voxels, d h w tokens per axis, E width of a token. Level 0 is full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl_ext.networks.base import triple


class ResidualBlock(nn.Module):
    """Add two normed convolutions to the input: (B, inputs, D, H, W) -> (B, outputs, D, H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int]) -> None:
        super().__init__()
        padding = triple([edge // 2 for edge in kernel])
        self.conv1 = nn.Conv3d(inputs, outputs, triple(kernel), padding=padding, bias=False)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, triple(kernel), padding=padding, bias=False)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1, bias=False)
        self.nonlin = nn.LeakyReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        changed = self.norm2(self.conv2(self.nonlin(self.norm1(self.conv1(image)))))
        return self.nonlin(changed + self.skip(image))


def up_sampling(inputs: int, outputs: int, stride: Sequence[int]) -> nn.ConvTranspose3d:
    """Build a transposed convolution whose kernel is its stride."""
    return nn.ConvTranspose3d(inputs, outputs, triple(stride), triple(stride), bias=False)


class UNETRDecoder(nn.Module):
    """Decode tokens as UNETR does.

    Its heads are ``seg_layers``, coarsest first, as in nnU-Net's networks.

    Args:
        input_channels: C of the image. Its own features are the skip of level 0.
        num_classes: Channels of an output.
        width: E.
        strides: Strides from level to level, the first (1, 1, 1). The last level is that of the tokens.
        features: Channels of level 0. They double with each level.
        deep_supervision: Return all outputs, full resolution first.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        width: int,
        strides: Sequence[Sequence[int]],
        features: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        levels = len(strides) - 1
        channels = [features * 2**level for level in range(levels)]
        # a kernel spans an axis only once the axis is halved, so not yet along a thick one
        kernels = [[3 if factor > 1 else 1 for factor in strides[level + 1]] for level in range(levels)]

        self.image = ResidualBlock(input_channels, channels[0], kernels[0])
        self.lifts = nn.ModuleList(
            lift(width, channels[level], strides[level + 1 :], kernels[level]) for level in range(1, levels)
        )
        inputs = [*channels[1:], width]
        self.ups = nn.ModuleList(
            up_sampling(inputs[level], channels[level], strides[level + 1]) for level in reversed(range(levels))
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(2 * channels[level], channels[level], kernels[level]) for level in reversed(range(levels))
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(channels[level], num_classes, 1) for level in reversed(range(levels)))

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Decode an image and one token map per level.

        Args:
            image: (B, C, D, H, W).
            maps: (B, E, d, h, w) each. The first, after the fewest blocks, goes to level 1. The last is the bottom.

        Returns:
            (B, classes, D, H, W), or with deep supervision one output per level, full resolution first.
        """
        skips = [self.image(image), *(lift(tokens) for lift, tokens in zip(self.lifts, maps[:-1], strict=True))]
        features, outputs = maps[-1], []
        for up, block, head, skip in zip(self.ups, self.blocks, self.seg_layers, reversed(skips), strict=True):
            features = block(torch.cat([up(features), skip], 1))
            if self.deep_supervision or head is self.seg_layers[-1]:
                outputs.append(head(features))
        return outputs[::-1] if self.deep_supervision else outputs[-1]


def lift(width: int, channels: int, strides: Sequence[Sequence[int]], kernel: Sequence[int]) -> nn.Sequential:
    """Build layers that upsample token maps: (B, E, d, h, w) -> (B, channels, *finer). ``strides`` finest first."""
    parts: list[nn.Module] = []
    for number, stride in enumerate(reversed(strides)):
        parts.append(up_sampling(width if number == 0 else channels, channels, stride))
        if number:
            parts.append(ResidualBlock(channels, channels, kernel))
    return nn.Sequential(*parts)
