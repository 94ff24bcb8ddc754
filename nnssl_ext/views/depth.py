"""From 2-D images to volumes: the variable dimension transform (Zhang et al., arXiv 2201.01426) and two variants.

B batch, D depth, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.views.random import BatchRandom, to_device

#: Of ImageNet's pixels over all colours, in eight bits (arXiv 2201.01426).
MEAN, DEVIATION = 114.495, 57.63
COLOURS = 3


def colours_as_depth(images: Tensor, random: BatchRandom) -> Tensor:
    """The colours, in a random order for each image, as slices: (B, 3, H, W) -> (B, 1, 3, H, W)."""
    orders = [random.generator(b).permutation(COLOURS) for b in range(len(images))]
    shuffled = [
        image[to_device(torch.from_numpy(order), image.device)] for image, order in zip(images, orders, strict=True)
    ]
    return torch.stack(shuffled)[:, None]


def grey(images: Tensor) -> Tensor:
    """Luminance (ITU-R BT.601): (B, 3, H, W) -> (B, 1, H, W)."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, COLOURS, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def repeated(images: Tensor, depth: int) -> Tensor:
    """The grey image as every slice: (B, 3, H, W) -> (B, 1, D, H, W)."""
    return grey(images)[:, :, None].expand(-1, -1, depth, -1, -1).contiguous()


def drifting(images: Tensor, random: BatchRandom, depth: int, angle: float, shift: float, zoom: float) -> Tensor:
    """Slices of the grey image under an affine that varies slowly along the depth: a pseudo-volume.

    Args:
        images: (B, 3, H, W).
        random: Where the two ends of each image's way come from.
        depth: D.
        angle: Largest turn at an end, in degrees.
        shift: Largest shift at an end, as a share of the edge.
        zoom: Largest change of the magnification at an end.

    Returns:
        (B, 1, D, H, W); pixels beyond the image repeat its edge.
    """
    batch, _, height, width = images.shape
    along = torch.linspace(0, 1, depth)[None, :, None]

    def way(limit: float, parameters: int) -> Tensor:
        ends = random.uniform(-limit, limit, (2, parameters))
        return ends[:, :1] * (1 - along) + ends[:, 1:] * along  # (B, D, parameters)

    turns = way(np.deg2rad(angle), 1)[..., 0]
    scales = 1 + way(zoom, 1)[..., 0]
    shifts = way(2 * shift, 2)  # grid_sample's coordinates run from -1 to 1
    cos, sin = turns.cos() * scales, turns.sin() * scales
    theta = torch.zeros(batch, depth, 2, 3)
    theta[..., 0, 0], theta[..., 0, 1] = cos, -sin * height / width
    theta[..., 1, 0], theta[..., 1, 1] = sin * width / height, cos
    theta[..., 2] = shifts
    theta = to_device(theta.flatten(0, 1), images.device)
    grid = F.affine_grid(theta, [batch * depth, 1, height, width], align_corners=False)
    slices = grey(images).repeat_interleave(depth, 0)
    moved = F.grid_sample(slices, grid, padding_mode="border", align_corners=False)
    return moved.view(batch, 1, depth, height, width)
