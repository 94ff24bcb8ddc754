"""Compute feature maps of a whole volume with nnU-Net's sliding window.

C channel, D H W voxels of the volume, d h w voxels of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor
from tqdm import tqdm

from nnssl_ext.errors import UserError
from nnssl_ext.networks.backbone import Backbone

#: Step of the window as a share of the patch, as nnU-Net's predictor has it.
STEP = 0.5


class Encoder:
    """Encoder of a network in evaluation mode.

    A 2-D network has maps of one slice each.

    Args:
        patch_size: Edges of the window in voxels, two or three.

    Raises:
        UserError: If the network cannot take the patch.
    """

    def __init__(self, backbone: Backbone, patch_size: Sequence[int], device: str) -> None:
        if problem := backbone.crop_problem(patch_size):
            raise UserError(f"{problem}. Set the patch size of the plans")
        backbone.network.to(device).eval()
        self.backbone, self.device, self.channels = backbone, device, backbone.channels
        # a 2-D network reads a volume slice by slice
        self.flat = len(patch_size) == 2
        lead = (1,) * self.flat
        self.patch = (*lead, *patch_size)
        self.strides = [(*lead, *stride) for stride in backbone.strides]

    @torch.inference_mode()
    def features(self, tiles: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Compute the maps of stages, on the CPU.

        (B, C, D, H, W) -> [(B, channels, d, h, w)].
        """
        tiles = tiles.to(self.device)
        maps = self.backbone.features(tiles.squeeze(2) if self.flat else tiles, max(stages) + 1)
        chosen = [maps[stage] for stage in stages]
        return [(found.unsqueeze(2) if self.flat else found).float().cpu() for found in chosen]


@dataclass(frozen=True)
class Grid:
    """Place of a volume in the padded volume that tiles cover.

    Attributes:
        shape: Edges of the volume in voxels.
        before: Voxels of padding before each axis.
        padded: Edges of the padded volume: multiples of the encoder's total stride.
        starts: First voxels of the tiles along each axis: multiples of the total stride.
    """

    shape: tuple[int, ...]
    before: tuple[int, ...]
    padded: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: Sequence[int], patch: Sequence[int], total: Sequence[int]) -> Grid:
        """Cover a volume with tiles.

        nnU-Net spreads tiles evenly over the voxels. A strided encoder samples a volume at every n-th voxel, so a tile
        that begins between two samples computes other features at the same place. Here tiles are spread over the
        deepest stage's grid: each begins at a multiple of the total stride, and so of every stage's stride. Features of
        overlapping tiles then belong to the same voxels. The volume is padded at its end to a multiple, too. The step
        is rounded down to whole samples, or else some samples would lie at the border of every tile that holds them.

        Args:
            shape: Edges of the volume.
            patch: Edges of a tile.
            total: Stride from the image to the deepest stage.
        """
        padded = [-(-max(edge, tile) // step) * step for edge, tile, step in zip(shape, patch, total, strict=True)]
        starts = []
        for edge, tile, step in zip(padded, patch, total, strict=True):
            samples = tile // step
            share = max(int(samples * STEP), 1) / samples
            (found,) = compute_steps_for_sliding_window((edge // step,), (samples,), share)
            starts.append(tuple(sorted({start * step for start in found})))
        return cls(
            tuple(shape),
            # a small volume lies in the middle, as nnU-Net pads it
            tuple(max(tile - edge, 0) // 2 for edge, tile in zip(shape, patch, strict=True)),
            tuple(padded),
            tuple(starts),
        )

    def pad(self, volume: Tensor) -> Tensor:
        """Pad a volume (..., D, H, W) with zeros, as nnU-Net does."""
        sides = [
            (start, whole - start - edge)
            for edge, start, whole in zip(self.shape, self.before, self.padded, strict=True)
        ]
        return F.pad(volume, [side for pair in reversed(sides) for side in pair])

    def crop(self, volume: Tensor) -> Tensor:
        """Undo ``pad`` for a volume (K, D, H, W)."""
        inside = [slice(start, start + edge) for start, edge in zip(self.before, self.shape, strict=True)]
        return volume[(slice(None), *inside)]

    def share(self, mask: Tensor, stride: Sequence[int]) -> Tensor:
        """Measure the share of each feature in a mask: (D, H, W) -> (d, h, w)."""
        return F.avg_pool3d(self.pad(mask.float())[None], tuple(stride), tuple(stride))[0]


def feature_maps(
    encoder: Encoder, image: Tensor, grid: Grid, stages: Sequence[int], batch: int, name: str = ""
) -> dict[int, Tensor]:
    """Compute maps of whole stages: (C, D, H, W) -> {stage: (channels, d, h, w)}.

    Tiles overlap by half and are averaged with nnU-Net's Gaussian weights. There is no mirroring, since the features of
    a mirrored image are other features.

    Args:
        image: A preprocessed image.
        grid: Its tiles.
        stages: Numbers of the stages, 0 is the finest.
        batch: Tiles per pass.
        name: Name of the case, for the progress bar.
    """
    padded, corners = grid.pad(image), list(product(*grid.starts))
    gaussian = compute_gaussian(encoder.patch, dtype=torch.float32, device=torch.device("cpu"))[None]
    sums, weights, gaussians = {}, {}, {}
    for stage in stages:
        stride = encoder.strides[stage]
        edges = [edge // step for edge, step in zip(grid.padded, stride, strict=True)]
        sums[stage], weights[stage] = torch.zeros(encoder.channels[stage], *edges), torch.zeros(edges)
        gaussians[stage] = F.avg_pool3d(gaussian, stride, stride)[0]
    batches = range(0, len(corners), batch)
    for first in tqdm(batches, desc=name, leave=False, disable=len(batches) < 3):
        chosen = corners[first : first + batch]
        tiles = torch.stack([padded[(slice(None), *_box(corner, encoder.patch, (1, 1, 1)))] for corner in chosen])
        for stage, maps in zip(stages, encoder.features(tiles, stages), strict=True):
            for corner, found in zip(chosen, maps, strict=True):
                box = _box(corner, encoder.patch, encoder.strides[stage])
                sums[stage][(slice(None), *box)] += found * gaussians[stage]
                weights[stage][box] += gaussians[stage]
    return {stage: sums[stage].div_(weights[stage]) for stage in stages}


def _box(corner: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> tuple[slice, ...]:
    """Return the voxels of a tile on the grid of a stage."""
    return tuple(slice(c // s, (c + p) // s) for c, p, s in zip(corner, patch, stride, strict=True))
