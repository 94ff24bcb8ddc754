"""Find the backbone of a network that plans can build.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.networks.architectures.vit import ViTUNETR
from nnssl_ext.networks.base import HEADS, Backbone, cumulative, drop_depth_strides, edges_problem, is_primus
from nnssl_ext.networks.pct_net_backbone import PCTNetBackbone
from nnssl_ext.networks.vit_backbone import ViTBackbone

__all__ = ["HEADS", "Backbone", "UNetBackbone", "backbone_of"]


class UNetBackbone(Backbone):
    """A plain or residual U-Net of dynamic-network-architectures.

    Args:
        network: The network. It is not owned.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.encoder: Any = network.encoder
        self.residual = isinstance(self.encoder, ResidualEncoder)

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return cumulative(self.encoder.strides)

    @property
    def channels(self) -> list[int]:
        return list(self.encoder.output_channels)

    @property
    def stem(self) -> nn.Conv3d:
        return next(module for module in self.encoder.modules() if isinstance(module, nn.Conv3d))

    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        maps, stem = [], getattr(self.encoder, "stem", None)
        image = image if stem is None else stem(image)
        for stage in self.encoder.stages[:stages]:
            image = stage(image)
            maps.append(image)
        return maps

    def features_and_output(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, decoder = self.features(image), self.network.decoder
        return maps, decoder(maps)  # type: ignore[operator]

    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        parts = [self.encoder.stages[:stages], getattr(self.encoder, "stem", None)]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def blocks(self) -> Iterable[nn.Module]:
        decoder: Any = self.network.decoder
        stem = getattr(self.encoder, "stem", None)
        return [*([] if stem is None else [stem]), *self.encoder.stages, *decoder.stages]

    def drop_depth_strides(self) -> None:
        drop_depth_strides(self.encoder.modules())

    def crop_problem(self, size: Sequence[int]) -> str:
        """Explain why a crop does not fit, else ''.

        Upsampled maps fit the skips only if edges are multiples of the total stride. A residual encoder needs twice
        that, because at once the stride its average-pooled skip is broadcast without an error. An instance norm
        needs more than one voxel at the bottleneck.
        """
        total = self.strides[-1]
        least = [2 * stride if self.residual and stride > 1 else stride for stride in total]
        return edges_problem(size, total, least)


def backbone_of(network: nn.Module) -> Backbone:
    """Return the backbone of a network.

    Raises:
        ValueError: For a network of an unknown kind.
    """
    if isinstance(network, (PlainConvUNet, ResidualEncoderUNet, ResidualUNet)):
        return UNetBackbone(network)
    if isinstance(network, ViTUNETR):
        return ViTBackbone(network)
    if isinstance(network, PCTNet):
        return PCTNetBackbone(network)
    if is_primus(network):
        from nnssl_ext.networks.primus_backbone import PrimusBackbone

        return PrimusBackbone(network)
    raise ValueError(
        f"cannot pretrain a network of type {type(network).__module__}.{type(network).__name__}. Expected "
        f"PlainConvUNet, ResidualEncoderUNet, ResidualUNet, Primus, ViTUNETR or PCTNet"
    )
