"""Define PCT-Net's blocks (Wang et al., arXiv 2306.16925).

They are pre-activated with batch norm and PReLU.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnssl_ext.networks.architectures.window_attention import SwinBlock


def convolution(inputs: int, outputs: int, flat: bool = False) -> nn.Conv3d:
    """Build a 3x3x3 convolution that keeps the size. ``flat`` makes it 1x3x3."""
    return nn.Conv3d(inputs, outputs, (1, 3, 3) if flat else 3, padding=(0, 1, 1) if flat else 1)


def step(flat: bool) -> tuple[int, int, int]:
    """Return the stride from a level to the next."""
    return (1, 2, 2) if flat else (2, 2, 2)


class ConvBlock(nn.Module):
    """Apply two convolutions, each after batch norm and PReLU: (B, inputs, D, H, W) -> (B, outputs, D, H, W)."""

    def __init__(self, inputs: int, outputs: int, *, flat: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.BatchNorm3d(inputs),
            nn.PReLU(),
            convolution(inputs, outputs, flat),
            nn.BatchNorm3d(outputs),
            nn.PReLU(),
            nn.Dropout(dropout),
            convolution(outputs, outputs, flat),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.conv_conv(image)


class DownSample(nn.Module):
    """Apply max pooling and a pre-activated convolution."""

    def __init__(self, inputs: int, outputs: int, *, flat_pool: bool = False, flat_kernel: bool = False) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(step(flat_pool))
        self.conv = nn.Sequential(nn.BatchNorm3d(inputs), nn.PReLU(), convolution(inputs, outputs, flat_kernel))

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(self.pool(image))


class UpCatBlock(nn.Module):
    """Upsample a deeper map and join it with the skip: (B, low, D, H, W), (B, high, *coarser) -> (B, low, D, H, W)."""

    def __init__(self, low: int, high: int, *, flat: bool = False) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.BatchNorm3d(high), nn.PReLU(), nn.ConvTranspose3d(high, low, step(flat), stride=step(flat))
        )
        self.conv = nn.Sequential(nn.BatchNorm3d(2 * low), nn.PReLU(), convolution(2 * low, low, flat))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(below)], 1))


class OutputLayer(nn.Module):
    """Compute logits of a map. Only the last convolution has nnU-Net's name of a head."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.BatchNorm3d(inputs), nn.PReLU())
        self.conv.add_module("seg_layers", nn.Conv3d(inputs, classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


class SwinLayer(nn.Module):
    """Apply a plain and a shifted block of window attention: (B, C, D, H, W) -> (B, C, D, H, W)."""

    def __init__(
        self, channels: int, *, heads: int, window: int, dropout: float, drop_path: float, mask_padding: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels=channels,
                window=window,
                heads=heads,
                shifted=shifted,
                dropout=dropout,
                drop_path=drop_path,
                mask_padding=mask_padding,
            )
            for shifted in (False, True)
        )

    def forward(self, image: Tensor) -> Tensor:
        voxels = image.movedim(1, -1)
        for block in self.blocks:
            voxels = block(voxels)
        return voxels.movedim(-1, 1)


class ConvTransBlock(nn.Module):
    """Sum convolutions and window attention: (B, C, D, H, W) -> (B, C, D, H, W)."""

    def __init__(
        self, channels: int, *, heads: int, window: int, dropout: float, drop_path: float, mask_padding: bool
    ) -> None:
        super().__init__()
        self.conv = ConvBlock(channels, channels, dropout=dropout)
        self.trans = SwinLayer(
            channels, heads=heads, window=window, dropout=dropout, drop_path=drop_path, mask_padding=mask_padding
        )
        # unused in the published network, but part of its weights
        self.norm_layer = nn.LayerNorm(channels).requires_grad_(False)
        self.pos_drop = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image) + self.trans(self.pos_drop(image))
