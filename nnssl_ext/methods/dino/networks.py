"""What self-distillation reads of a network: a vector for the whole image and one for each cell, and their heads.

B batch, C channel, D H W voxels, d h w cells, N = d h w, F features, E width of a projected vector, K prototypes.
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
    """Reads a backbone.

    Args:
        backbone: The network's view; copied with the reader, so that a teacher reads its own network.

    Attributes:
        cell: Edges of a cell in voxels.
        image_width, cell_width: F of an image's and of a cell's vector.
        hides_voxels: Whether a hidden cell is hidden in the image; otherwise the network hides it itself.
    """

    cell: Triple
    image_width: int
    cell_width: int
    hides_voxels: bool

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.network

    def cells(self, size: Sequence[int]) -> Triple:
        """Cells per axis of a crop."""
        return triple([edge // step for edge, step in zip(size, self.cell, strict=True)])

    @abstractmethod
    def forward(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, D, H, W), (B, N) bool or None -> image vectors (B, F), cell vectors (B, N, F)."""


class MapReader(Reader):
    """Of a network of feature maps: octant means of a layer at each voxel of the deepest, and a finer map's voxels.

    After an instance norm the plain mean over a map hardly tells images apart (``networks.heads``): at the start all
    targets would be alike, and a teacher that says nothing teaches nothing.

    Args:
        backbone: Any network.
        cell_stride: Cells are the voxels of the deepest map whose stride is at most this along every axis.
    """

    hides_voxels = True

    def __init__(self, backbone: Backbone, cell_stride: int) -> None:
        super().__init__(backbone)
        fine = [level for level, stride in enumerate(backbone.strides) if max(stride) <= cell_stride]
        self.level = fine[-1] if fine else 0
        self.cell = triple(backbone.strides[self.level])
        width = backbone.channels[-1]
        self.image_width, self.cell_width = GRID**3 * width, backbone.channels[self.level]
        self.voxel = nn.Sequential(nn.Conv3d(width, width, 1), nn.GELU())

    def forward(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        maps = self.backbone.features(image)
        return grid_features(self.voxel(maps[-1])), maps[self.level].flatten(2).transpose(1, 2)


class TokenReader(Reader):
    """Of a vision transformer: its CLS token and its other tokens; hidden ones are replaced by its mask token.

    Args:
        backbone: Of a vision transformer, whose mask token is put into the training.
    """

    backbone: ViTBackbone
    hides_voxels = False

    def __init__(self, backbone: ViTBackbone) -> None:
        super().__init__(backbone)
        backbone.train_mask_token()
        self.cell = triple(backbone.strides[0])
        self.image_width = self.cell_width = backbone.channels[0]

    def forward(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.backbone.tokens(image, hidden)
        return tokens[:, 0], tokens[:, 1:]


class ProjectionHead(nn.Module):
    """Three layers to the unit sphere, and the prototypes there: DINO's head.

    Caron et al., "DINO", ICCV 2021, arXiv 2104.14294.

    Args:
        width: F.
        hidden: Width of the two layers between.
        bottleneck: E.
        prototypes: K.
    """

    def __init__(self, *, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.directions = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.normal_(self.directions, std=1 / math.sqrt(bottleneck))

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., F) -> (..., E), on the unit sphere."""
        return F.normalize(self.mlp(vectors).float(), dim=-1)

    @property
    def prototypes(self) -> Tensor:
        """(K, E), on the unit sphere."""
        return F.normalize(self.directions.float(), dim=-1)


class DistilledNetwork(nn.Module):
    """A student or a teacher: a network's reader and the two heads.

    Args:
        reader: Of the network.
        head: Arguments of both heads but their width.
    """

    def __init__(self, reader: Reader, **head: Any) -> None:
        super().__init__()
        self.reader = reader
        self.image_head = ProjectionHead(width=reader.image_width, **head)
        self.cell_head = ProjectionHead(width=reader.cell_width, **head)


def reader_of(backbone: Backbone, cell_stride: int) -> Reader:
    """The reader that suits a network."""
    if isinstance(backbone, ViTBackbone):
        return TokenReader(backbone)
    return MapReader(backbone, cell_stride)
