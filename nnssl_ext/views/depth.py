"""Make volumes from 2-D images in three variants.

Zhang et al., arXiv 2201.01426.

B batch, D depth, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.random import BatchRandom, to_device

#: Mean and deviation of ImageNet's pixels over all colors, in eight bits (arXiv 2201.01426).
MEAN, DEVIATION = 114.495, 57.63
COLORS = 3


def colors_as_depth(images: Tensor, random: BatchRandom) -> Tensor:
    """Stack the colors as slices, in a random order per image: (B, 3, H, W) -> (B, 1, 3, H, W)."""
    orders = torch.from_numpy(np.stack([random.generator(b).permutation(COLORS) for b in range(len(images))]))
    order = to_device(orders, images.device)[:, :, None, None].expand_as(images)
    return images.gather(1, order)[:, None]


def luminance(images: Tensor) -> Tensor:
    """Compute the luminance (ITU-R BT.601): (B, 3, H, W) -> (B, 1, H, W)."""
    weights = to_device(torch.tensor([0.299, 0.587, 0.114]), images.device, images.dtype).view(1, COLORS, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def repeated(images: Tensor, depth: int) -> Tensor:
    """Repeat the gray image as every slice: (B, 3, H, W) -> (B, 1, D, H, W)."""
    return luminance(images)[:, :, None].expand(-1, -1, depth, -1, -1).contiguous()


def drifting(images: Tensor, random: BatchRandom, depth: int, angle: float, shift: float, zoom: float) -> Tensor:
    """Stack gray images under a slowly varying affine map.

    Args:
        images: (B, 3, H, W).
        random: One stream per image, for the two ends of its drift.
        depth: D.
        angle: Largest rotation at an end, in degrees.
        shift: Largest shift at an end, as a share of the edge.
        zoom: Largest change of magnification at an end.

    Returns:
        (B, 1, D, H, W). Pixels beyond the image repeat its border.
    """
    batch, _, height, width = images.shape
    along = torch.linspace(0, 1, depth)[None, :, None]

    def drift(limit: float, parameters: int) -> Tensor:
        ends = random.uniform(-limit, limit, (2, parameters))
        return ends[:, :1] * (1 - along) + ends[:, 1:] * along  # (B, D, parameters)

    angles = drift(np.deg2rad(angle), 1)[..., 0]
    scales = 1 + drift(zoom, 1)[..., 0]
    shifts = drift(2 * shift, 2)  # grid_sample's coordinates run from -1 to 1
    cos, sin = angles.cos() * scales, angles.sin() * scales
    theta = torch.zeros(batch, depth, 2, 3)
    theta[..., 0, 0], theta[..., 0, 1] = cos, -sin * height / width
    theta[..., 1, 0], theta[..., 1, 1] = sin * width / height, cos
    theta[..., 2] = shifts
    theta = to_device(theta.flatten(0, 1), images.device)
    grid = F.affine_grid(theta, [batch * depth, 1, height, width], align_corners=False)
    slices = luminance(images).repeat_interleave(depth, 0)
    moved = F.grid_sample(slices, grid, padding_mode="border", align_corners=False)
    return moved.view(batch, 1, depth, height, width)
