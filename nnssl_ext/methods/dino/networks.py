"""Define image and patch vectors, and projection heads.

B batch, C channel, D H W voxels, d h w patches per axis, N = d h w, F features, E width of a projected vector,
K prototypes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.networks.base import Backbone, Triple, triple
from nnssl_ext.networks.heads import GRID, grid_features
from nnssl_ext.networks.vit_backbone import ViTBackbone


class Reader(nn.Module, ABC):
    """Extract image and patch vectors from a backbone.

    A copy of the reader copies the backbone, too: a teacher has its own network.

    Attributes:
        patch: Edges of a patch in voxels.
        image_width: F of an image vector.
        patch_width: F of a patch vector.
        masks_voxels: Whether patches are masked in the image. Otherwise the network masks its tokens.
    """

    patch: Triple
    image_width: int
    patch_width: int
    masks_voxels: bool

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.network

    def grid(self, size: Sequence[int]) -> Triple:
        """Return the patches per axis of a crop."""
        return triple(edge // step for edge, step in zip(size, self.patch, strict=True))

    @abstractmethod
    def forward(self, image: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute image (B, F) and patch vectors (B, N, F).

        Args:
            image: (B, C, D, H, W).
            masked: (B, N) bool, which patches are masked. None masks none.
        """


class MapReader(Reader):
    """Read feature maps.

    Image vectors are octant means of the deepest map, patch vectors voxels of a finer one.

    After an instance norm the mean over a whole map is nearly the same for all images (``networks.heads``). All targets
    would then be alike from the start, and there would be nothing to learn from them. ``level`` is the encoder stage
    whose voxels are patches.
    """

    masks_voxels = True

    def __init__(self, backbone: Backbone, level: int) -> None:
        super().__init__(backbone)
        self.level, self.patch = level, triple(backbone.strides[level])
        width = backbone.channels[-1]
        self.image_width, self.patch_width = GRID**3 * width, backbone.channels[level]
        self.voxel = nn.Sequential(nn.Conv3d(width, width, 1), nn.GELU())

    def forward(self, image: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        maps = self.backbone.features(image)
        return grid_features(self.voxel(maps[-1])), maps[self.level].flatten(2).transpose(1, 2)


class TokenReader(Reader):
    """Read a vision transformer's CLS and patch tokens.

    Its mask token replaces masked ones, and becomes trainable.
    """

    backbone: ViTBackbone
    masks_voxels = False

    def __init__(self, backbone: ViTBackbone) -> None:
        super().__init__(backbone)
        backbone.train_mask_token()
        self.patch = triple(backbone.strides[0])
        self.image_width = self.patch_width = backbone.channels[0]

    def forward(self, image: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.backbone.tokens(image, masked)
        return tokens[:, 0], tokens[:, 1:]


class ProjectionHead(nn.Module):
    """Project vectors to the prototypes' unit sphere.

    Caron et al., "DINO", ICCV 2021, arXiv 2104.14294.

    Args:
        width: F.
        hidden_dim: Width of the two layers between.
        bottleneck_dim: E.
        prototypes: K.
    """

    def __init__(self, *, width: int, hidden_dim: int, bottleneck_dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototype_weight = nn.Parameter(torch.empty(prototypes, bottleneck_dim))
        nn.init.normal_(self.prototype_weight, std=1 / math.sqrt(bottleneck_dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Project (..., F) to (..., E) on the unit sphere."""
        return F.normalize(self.mlp(vectors).float(), dim=-1)

    @property
    def prototypes(self) -> Tensor:
        """(K, E) on the unit sphere."""
        return F.normalize(self.prototype_weight.float(), dim=-1)


class DistilledNetwork(nn.Module):
    """Join a reader and two projection heads. ``head`` is their arguments without the width."""

    def __init__(self, reader: Reader, **head: Any) -> None:
        super().__init__()
        self.reader = reader
        self.image_head = ProjectionHead(width=reader.image_width, **head)
        self.patch_head = ProjectionHead(width=reader.patch_width, **head)

    def head(self, level: str) -> ProjectionHead:
        """Return the head of a level, ``image`` or ``patch``."""
        head: ProjectionHead = getattr(self, f"{level}_head")
        return head


def reader_of(backbone: Backbone, level: int) -> Reader:
    """Choose the reader of a backbone. Patches are the voxels of stage ``level``, or a vision transformer's tokens."""
    if isinstance(backbone, ViTBackbone):
        return TokenReader(backbone)
    return MapReader(backbone, level)
