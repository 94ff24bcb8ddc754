"""Define window attention with a learned bias per relative position.

Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030, in 3-D and with the tensor names of PCT-Net (Wang et al.,
arXiv 2306.16925).

B batch, C channel, D H W voxels of a map, N voxels of a window, n windows of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.networks.architectures.blocks import DropPath, Mlp

#: Added to the logits of masked pairs. Finite, so that a fully masked row does not give NaN.
MASKED = -100.0


class WindowAttention(nn.Module):
    """Apply attention within each window: (B n, N, C) -> (B n, N, C).

    Args:
        channels: C.
        window: Edge of the largest window.
        heads: Attention heads.
        dropout: Dropout of the attention and of the result.
    """

    relative_position_index: Tensor

    def __init__(self, *, channels: int, window: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.window, self.heads, self.dropout = window, heads, dropout
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def bias(self, edges: Sequence[int]) -> Tensor:
        """Return a window's bias (heads, N, N). It is contiguous, since fused attention on GPUs takes nothing else."""
        d, h, w = edges
        index = self.relative_position_index.view([self.window] * 6)[:d, :h, :w, :d, :h, :w]
        return self.relative_position_bias_table[index.reshape(d * h * w, -1)].permute(2, 0, 1).contiguous()

    def forward(self, voxels: Tensor, edges: Sequence[int], mask: Tensor | None) -> Tensor:
        """Attend within windows. ``mask`` (n, N, N) is added to the logits, None masks nothing."""
        query, key, value = self.qkv(voxels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.bias(edges)[None]
        if mask is not None:
            logits = (logits + mask[:, None]).to(query.dtype).repeat(len(voxels) // len(mask), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=logits.to(query.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )  # (B n, heads, N, C / heads)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class SwinBlock(nn.Module):
    """Add window attention and a perceptron to the input: (B, D, H, W, C) -> (B, D, H, W, C).

    Along an axis that is no longer than the window, the window is the axis and is not shifted. Along others the map is
    padded to whole windows. Where an axis is exactly one window long, no axis is shifted, as in the published network.

    Args:
        channels, window, heads, dropout: The attention's.
        shifted: Shift windows by half their edge.
        drop_path: Probability that a sample skips a branch in training.
        mask_padding: Mask padding. Published PCT-Nets do not.
    """

    def __init__(
        self,
        *,
        channels: int,
        window: int,
        heads: int,
        shifted: bool,
        dropout: float,
        drop_path: float,
        mask_padding: bool,
    ) -> None:
        super().__init__()
        self.window, self.shifted, self.mask_padding = window, shifted, mask_padding
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels=channels, window=window, heads=heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, volume: Tensor) -> Tensor:
        volume = self.drop_path(volume, lambda own: self._attend(self.norm1(own)))
        return self.drop_path(volume, lambda own: self.mlp(self.norm2(own)))

    def _attend(self, volume: Tensor) -> Tensor:
        size = volume.shape[1:4]
        edges = [min(self.window, edge) for edge in size]
        # published PCT-Nets do not shift where one axis is exactly one window long
        shifted = self.shifted and self.window not in size
        shift = [window // 2 if shifted and edge > window else 0 for edge, window in zip(size, edges, strict=True)]
        padded = [-(-edge // window) * window for edge, window in zip(size, edges, strict=True)]
        margin = [full - edge for full, edge in zip(padded, size, strict=True)]
        volume = F.pad(volume, (0, 0, 0, margin[2], 0, margin[1], 0, margin[0]))
        volume = volume.roll([-step for step in shift], (1, 2, 3))

        hidden = None
        if any(shift) or (any(margin) and self.mask_padding):
            hidden = window_mask(size, edges, shift, self.mask_padding, volume.device)
        windows = self.attn(partition(volume, edges), edges, hidden)
        volume = merge(windows, edges, padded).roll(shift, (1, 2, 3))
        return volume[:, : size[0], : size[1], : size[2]]


def relative_positions(window: int) -> Tensor:
    """Return each voxel pair's entry of the bias table: (N, N).

    The factor of the first axis is 3 w - 1 as in the published weights, although (2 w - 1)^2 would keep all offsets
    apart.
    """
    axis = torch.arange(window)
    voxels = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1)  # (3, N)
    offset = voxels[:, :, None] - voxels[:, None, :] + window - 1
    return offset[0] * (3 * window - 1) + offset[1] * (2 * window - 1) + offset[2]


def partition(volume: Tensor, edges: Sequence[int]) -> Tensor:
    """Cut a map into windows: (B, D, H, W, C) -> (B n, N, C)."""
    d, h, w = edges
    batch, depth, height, width, channels = volume.shape
    split = volume.reshape(batch, depth // d, d, height // h, h, width // w, w, channels)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, d * h * w, channels)


def merge(windows: Tensor, edges: Sequence[int], size: Sequence[int]) -> Tensor:
    """Undo ``partition``: (B n, N, C) -> (B, *size, C)."""
    (d, h, w), (depth, height, width) = edges, size
    split = windows.reshape(-1, depth // d, height // h, width // w, d, h, w, windows.shape[-1])
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, depth, height, width, windows.shape[-1])


def window_mask(
    size: Sequence[int], edges: Sequence[int], shift: Sequence[int], mask_padding: bool, device: torch.device
) -> Tensor:
    """Return each window's mask: (n, N, N), 0 or ``MASKED``.

    A cyclic shift brings voxels from opposite ends of the map, and padding, into one window. Each kind is a region of
    its own, and regions do not attend to each other.
    """
    region = torch.zeros((1, 1, 1), dtype=torch.long, device=device)
    for axis, (edge, window, step) in enumerate(zip(size, edges, shift, strict=True)):
        full = -(-edge // window) * window
        place = torch.arange(full, device=device)
        label = (place >= full - step).long() if step else torch.zeros_like(place)
        if mask_padding:
            label = torch.where((place + step) % full >= edge, 2, label)
        region = 3 * region + label.view([-1 if other == axis else 1 for other in range(3)])
    voxels = partition(region[None, ..., None], edges).squeeze(-1)  # (n, N)
    apart = voxels[:, :, None] != voxels[:, None, :]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, MASKED)
