"""Define the backbone of PCT-Net.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.networks.base import Backbone, cumulative, drop_depth_strides, edges_problem


class PCTNetBackbone(Backbone):
    """Backbone of a ``PCTNet``, whose encoder has five stages."""

    network: PCTNet

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return cumulative(self.network.strides)

    @property
    def channels(self) -> list[int]:
        return self.network.features_per_stage

    @property
    def stem(self) -> nn.Conv3d:
        return self.network.embedding.proj

    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        return self.network.encode(image, len(self.strides[:stages]))

    def features_and_output(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = self.network.encode(image)
        return maps, self.network.decode(maps)  # type: ignore[return-value]

    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        return [parameter for part in self._stages()[:stages] for module in part for parameter in module.parameters()]

    def blocks(self) -> Iterable[nn.Module]:
        network, pyramid = self.network, self.network.pyramid_ct
        inner = [part for name, part in pyramid.named_children() if not name.startswith("out_conv")]
        head = network.pred_heads[network.resolution_mode]
        outer = [part for name, part in head.named_children() if not name.startswith("out_conv")]
        encoder = [part for name, part in network.embedding.named_children() if name != "proj"]
        return [*encoder, *inner, *outer, *network.output_layers]

    def drop_depth_strides(self) -> None:
        drop_depth_strides(module for part in self._stages() for outer in part for module in outer.modules())

    def freeze_coarse_heads(self) -> None:
        for layer in self.network.output_layers[1:]:
            layer.requires_grad_(False)

    def crop_problem(self, size: Sequence[int]) -> str:
        """Explain why a crop does not fit, else ''.

        Upsampled maps fit the skips only if edges are multiples of the total stride. A batch norm needs more than one
        voxel at the bottleneck.
        """
        total = self.strides[-1]
        return edges_problem(size, total, total)

    def _stages(self) -> list[list[nn.Module]]:
        """Return the modules of each encoder stage."""
        embedding, pyramid = self.network.embedding, self.network.pyramid_ct
        return [
            [embedding.proj, embedding.conv0],
            [embedding.down1, embedding.conv1],
            [embedding.down2, pyramid.convtrans_e2],
            [pyramid.down3, pyramid.convtrans_e3],
            [pyramid.down4, pyramid.convtrans_e4],
        ]
