"""Reduce feature maps to principal components, and write them on the image's grid.

C channel, K component, D H W voxels of the volume, d h w voxels of a stage.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from torch import Tensor

from nnssl_ext.features.window import Grid
from nnssl_ext.files import replaced_on_success
from nnssl_ext.transfer.target import TargetPlans


def principal_axes(found: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and principal axes of a map's voxels.

    Voxels are weighted with their share of the image.

    Args:
        found: (C, d, h, w).
        share: (d, h, w).

    Returns:
        Mean (C,), and axes as columns (C, C), the one of most variance first. The largest entry of each is positive.
    """
    values, weights = found.flatten(1).double(), share.flatten().double()
    mean = values @ weights / weights.sum()
    centered = (values - mean[:, None]) * weights.sqrt()
    axes = torch.linalg.eigh(centered @ centered.T).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return mean.float(), (axes * largest.sign()).float()


def project(found: Tensor, basis: tuple[Tensor, Tensor], components: int) -> Tensor:
    """Compute the first components of a map: (C, d, h, w) -> (K, d, h, w)."""
    mean, axes = basis
    return torch.einsum("ck,cdhw->kdhw", axes[:, :components], found - mean[:, None, None, None])


def enlarge(found: Tensor, grid: Grid) -> Tensor:
    """Bring a map to the voxels of the preprocessed volume: (K, d, h, w) -> (K, D, H, W)."""
    return grid.crop(F.interpolate(found[None], grid.padded, mode="trilinear", align_corners=False)[0])


def on_image(volume: Tensor, properties: Mapping[str, Any], plans: TargetPlans) -> np.ndarray:
    """Bring a preprocessed volume to the image's own grid.

    nnU-Net does the same with its predictions. Outside the box that nnU-Net crops to, the result is zero. (K, D, H, W)
    -> (K, *edges of the image).
    """
    spacing = [properties["spacing"][axis] for axis in plans.plans.transpose_forward]
    current = plans.configuration.spacing
    current = current if len(current) == 3 else [spacing[0], *current]
    edges = properties["shape_after_cropping_and_before_resampling"]
    resampled = plans.configuration.resampling_fn_probabilities(volume.numpy(), edges, current, spacing)
    result = np.zeros((len(volume), *properties["shape_before_cropping"]), np.float32)
    result[(slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))] = np.asarray(resampled)
    return result.transpose(0, *(axis + 1 for axis in plans.plans.transpose_backward))


def affine_of(properties: Mapping[str, Any]) -> np.ndarray:
    """Return the NIfTI affine of an image that nnU-Net read.

    The readers that reorient images give the reoriented grid.
    """
    if found := properties.get("nibabel_stuff"):
        return np.asarray(found.get("reoriented_affine", found["original_affine"]))
    affine = np.diag([*reversed(properties["spacing"]), 1.0])
    if found := properties.get("sitk_stuff"):
        axes = len(found["spacing"])
        affine[:axes, :axes] = np.reshape(found["direction"], (axes, axes)) * found["spacing"]
        affine[:axes, 3] = found["origin"]
        affine[:2] *= -1  # ITK counts towards left and back, NIfTI towards right and front
    return affine


def write_nifti(volume: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a volume as 4-D NIfTI atomically: (K, D, H, W) -> (W, H, D, K)."""
    image = nibabel.Nifti1Image(volume.transpose(3, 2, 1, 0), affine)
    with replaced_on_success(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        image.to_stream(file)
