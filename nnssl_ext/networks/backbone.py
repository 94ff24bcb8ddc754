"""How a method sees a segmentation network that plans can build: its encoder's features and the crops it can take.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

#: The last part of the name of the layers that stock nnU-Net does not transfer.
HEADS = ".seg_layers."


class UNetBackbone:
    """A plain or residual U-Net of dynamic-network-architectures.

    Args:
        network: The network; it is looked at, not owned.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.encoder: Any = network.encoder
        self.residual = isinstance(self.encoder, ResidualEncoder)

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """Cumulative stride of each encoder stage, per axis."""
        return [tuple(row) for row in np.cumprod(np.asarray(self.encoder.strides), axis=0).tolist()]

    @property
    def channels(self) -> list[int]:
        """Channels of each encoder stage."""
        return list(self.encoder.output_channels)

    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        """Feature maps of the encoder's first stages (None: of all), finest first.

        (B, C, D, H, W) -> [(B, channels[i], *edges / strides[i])].
        """
        maps, stem = [], getattr(self.encoder, "stem", None)
        image = image if stem is None else stem(image)
        for stage in self.encoder.stages[:stages]:
            image = stage(image)
            maps.append(image)
        return maps

    def train_encoder_only(self, stages: int | None = None) -> None:
        """Take the decoder, and the encoder's stages after the first ``stages``, out of the training."""
        parts = [self.encoder.stages[:stages], getattr(self.encoder, "stem", None)]
        # the decoder holds the encoder too, so tensors are told apart by themselves and not by name
        trained = {id(p) for part in parts if part is not None for p in part.parameters()}
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def drop_depth_strides(self) -> None:
        """Make every stride of the encoder along the first axis one; no weight depends on a stride."""
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, *module.stride[1:])
            elif isinstance(module, (nn.AvgPool3d, nn.MaxPool3d)):
                kernel, stride = (
                    size if isinstance(size, (tuple, list)) else (size,) * 3
                    for size in (module.kernel_size, module.stride)
                )
                module.kernel_size, module.stride = (1, *kernel[1:]), (1, *stride[1:])

    def equalise_input_channels(self) -> None:
        """Give all input channels the same kernels, their mean: they stay equal under inputs that are."""
        first = next(module for module in self.encoder.modules() if isinstance(module, nn.Conv3d))
        with torch.no_grad():
            first.weight.copy_(first.weight.mean(1, keepdim=True).expand_as(first.weight).clone())

    def set_deep_supervision(self, enabled: bool) -> None:
        """Whether the network returns all its outputs, full resolution first, or only the first."""
        decoder: Any = self.network.decoder
        decoder.deep_supervision = enabled

    def freeze_coarse_heads(self) -> None:
        """Take the heads of the coarser outputs out of the training; without deep supervision they get no gradient."""
        heads: Any = self.network.decoder.seg_layers  # type: ignore[union-attr]
        for head in list(heads)[:-1]:
            head.requires_grad_(False)

    def crop_problem(self, size: Sequence[int]) -> str:
        """Why the whole network cannot take a crop with these edges; '' if it can.

        Up-sampled maps meet the skips only where edges are multiples of the total stride. A residual encoder needs
        twice that: at once it, its average-pooled skip is broadcast onto a larger map without any error. And an
        instance norm needs more than one voxel at the bottleneck.
        """
        total = self.strides[-1]
        for axis, (edge, stride) in enumerate(zip(size, total, strict=True)):
            least = 2 * stride if self.residual and stride > 1 else stride
            if edge % stride or edge < least:
                lower, upper = max(edge // stride * stride, least), max(-(-edge // stride) * stride, least)
                near = f"{lower}" if lower == upper else f"{lower} or {upper}"
                return (
                    f"crop edge {edge} (axis {axis} of {tuple(size)}) does not fit the network: it must be a multiple "
                    f"of {stride}, at least {least}; use {near}"
                )
        if np.prod([edge // stride for edge, stride in zip(size, total, strict=True)]) < 2:
            return f"crop {tuple(size)} leaves one voxel at the bottleneck (stride {total}); use a larger crop"
        return ""


def backbone_of(network: nn.Module) -> UNetBackbone:
    """The view of a network.

    Raises:
        ValueError: For a network of a kind that is not known.
    """
    if isinstance(network, (PlainConvUNet, ResidualEncoderUNet, ResidualUNet)):
        return UNetBackbone(network)
    raise ValueError(
        f"cannot pretrain a network of type {type(network).__module__}.{type(network).__name__}; "
        f"known are PlainConvUNet, ResidualEncoderUNet and ResidualUNet"
    )
