"""Make volumes from 2-D images.

Zhang et al., arXiv 2201.01426.

B batch, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.views.random import BatchRandom, to_device

#: Mean and deviation of ImageNet's pixels over all colors, in eight bits (arXiv 2201.01426).
MEAN, DEVIATION = 114.495, 57.63


def colors_as_depth(images: Tensor, random: BatchRandom) -> Tensor:
    """Stack the colors as slices, in a random order per image: (B, 3, H, W) -> (B, 1, 3, H, W)."""
    orders = np.stack([random.generator(b).permutation(3) for b in range(len(images))])
    # torch takes no other type; on Windows numpy before 2.0 draws int32
    order = to_device(torch.from_numpy(orders.astype(np.int64)), images.device)
    return images.gather(1, order[:, :, None, None].expand_as(images))[:, None]
