"""Define PCT-Net, a U-Net with window attention.

Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale Unannotated
Dataset", arXiv 2306.16925. Tensor names are the published ones, except for the final
convolutions (``published_name``).

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nnssl_ext.networks.architectures.pct_net_blocks import (
    ConvBlock,
    ConvTransBlock,
    DownSample,
    OutputLayer,
    UpCatBlock,
    convolution,
)
from nnssl_ext.networks.strides import halving_strides

#: For each resolution mode, whether levels 0 and 1 are flat: neither convolved nor halved along the first axis.
FLAT = ((False, False), (True, False), (True, True))
#: Strides from stage to stage in each resolution mode.
STRIDES = tuple(
    ((1, 1, 1), *((1, 2, 2) if flat else (2, 2, 2) for flat in levels), (2, 2, 2), (2, 2, 2)) for levels in FLAT
)
#: The convolution that makes an output, as published and as it is called here.
PUBLISHED_HEAD, HEAD = re.compile(r"(out_conv\d\.conv)\.2\."), r"\1.seg_layers."


class PatchEmbedding(nn.Module):
    """Encode levels 0 and 1 and step to level 2."""

    def __init__(self, channels: int, widths: Sequence[int], flat: Sequence[bool], dropout: Sequence[float]) -> None:
        super().__init__()
        self.proj = convolution(channels, widths[0], flat[0])
        self.conv0 = ConvBlock(widths[0], widths[0], flat=flat[0], dropout=dropout[0])
        self.conv1 = ConvBlock(widths[1], widths[1], flat=flat[1], dropout=dropout[1])
        self.down1 = DownSample(widths[0], widths[1], flat_pool=flat[0], flat_kernel=flat[1])
        self.down2 = DownSample(widths[1], widths[2], flat_pool=flat[1])

    def forward(self, image: Tensor, levels: int = 3) -> list[Tensor]:
        """Return the first maps of (B, C, D, H, W). Level 2 is the pyramid's input."""
        maps = [self.conv0(self.proj(image))]
        if levels > 1:
            maps.append(self.conv1(self.down1(maps[0])))
        if levels > 2:
            maps.append(self.down2(maps[1]))
        return maps


class PyramidConvTrans(nn.Module):
    """Encode and decode levels 2 to 4."""

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        *,
        heads: Sequence[int],
        window: int,
        dropout: Sequence[float],
        drop_path: float,
        mask_padding: bool,
    ) -> None:
        super().__init__()
        self.down3 = DownSample(widths[0], widths[1])
        self.down4 = DownSample(widths[1], widths[2])
        self.up3 = UpCatBlock(widths[0], widths[1])
        self.up4 = UpCatBlock(widths[1], widths[2])

        def block(level: int) -> ConvTransBlock:
            return ConvTransBlock(
                widths[level],
                heads=heads[level],
                window=window,
                dropout=dropout[level],
                drop_path=drop_path,
                mask_padding=mask_padding,
            )

        self.convtrans_e2, self.convtrans_d2 = block(0), block(0)
        self.convtrans_e3, self.convtrans_d3 = block(1), block(1)
        self.convtrans_e4 = block(2)
        self.out_conv2 = OutputLayer(widths[0], classes)
        self.out_conv3 = OutputLayer(widths[1], classes)

    def encode(self, image: Tensor, levels: int = 3) -> list[Tensor]:
        """Encode level 2 to the first of levels 2 to 4."""
        maps = [self.convtrans_e2(image)]
        if levels > 1:
            maps.append(self.convtrans_e3(self.down3(maps[0])))
        if levels > 2:
            maps.append(self.convtrans_e4(self.down4(maps[1])))
        return maps

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode levels 2, 3 and 4 to levels 2 and 3."""
        level3 = self.convtrans_d3(self.up4(maps[1], maps[2]))
        return self.convtrans_d2(self.up3(maps[0], level3)), level3


class PredictionHead(nn.Module):
    """Decode levels 1 and 0."""

    def __init__(self, widths: Sequence[int], classes: int, flat: Sequence[bool], dropout: Sequence[float]) -> None:
        super().__init__()
        self.up1 = UpCatBlock(widths[0], widths[1], flat=flat[0])
        self.up2 = UpCatBlock(widths[1], widths[2], flat=flat[1])
        self.conv0 = ConvBlock(widths[0], widths[0], flat=flat[0], dropout=dropout[0])
        self.conv1 = ConvBlock(widths[1], widths[1], flat=flat[1], dropout=dropout[1])
        self.out_conv0 = OutputLayer(widths[0], classes)
        self.out_conv1 = OutputLayer(widths[1], classes)

    def forward(self, level0: Tensor, level1: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Decode levels 0 and 1 from skips and level 2."""
        decoded = self.conv1(self.up2(level1, below))
        return self.conv0(self.up1(level0, decoded)), decoded


class PCTNet(nn.Module):
    """PCT-Net for crops of any legal size.

    Plans name it as ``nnssl_ext.networks.architectures.pct_net.PCTNet``. It holds three embeddings and three prediction
    heads, for thin, thicker and thick slices. ``strides`` chooses one of each. The others are kept untrained, so that
    every file fits every network.

    Args:
        input_channels: C.
        num_classes: Channels of an output.
        deep_supervision: Return all four outputs, full resolution first.
        strides: One of ``STRIDES``, with a total of 4 x 4 x 4, 2 x 4 x 4 or 1 x 4 x 4 down to level 2.
        features_per_stage: Channels of levels 0 to 4.
        heads: Attention heads of levels 2 to 4.
        window: Edge of an attention window in voxels of the map.
        dropout: Dropout of levels 0 to 4.
        drop_path: Probability that a sample skips a branch of an attention block in training.
        mask_padding: Mask the padding of windows. False as published, which published weights expect.

    Raises:
        ValueError: For other strides or widths.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        strides: Sequence[Sequence[int]] = STRIDES[0],
        features_per_stage: Sequence[int] = (24, 48, 128, 256, 512),
        heads: Sequence[int] = (4, 8, 16),
        window: int = 6,
        dropout: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        drop_path: float = 0.2,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        self.strides = tuple(tuple(stride) for stride in strides)
        if self.strides not in STRIDES:
            known = " or ".join(str([list(stride) for stride in known]) for known in STRIDES)
            raise ValueError(f"Expected PCTNet strides {known}, got {[list(stride) for stride in strides]}.")
        self.resolution_mode = STRIDES.index(self.strides)
        self.deep_supervision = deep_supervision
        widths = self.features_per_stage = list(features_per_stage)
        if len(widths) != 5 or any(width % count for width, count in zip(widths[2:], heads, strict=True)):
            raise ValueError(f"PCTNet needs five widths, the last three multiples of its heads {heads}, got {widths}")

        self.embeddings = nn.ModuleList(PatchEmbedding(input_channels, widths, flat, dropout) for flat in FLAT)
        self.pyramid_ct = PyramidConvTrans(
            widths[2:],
            num_classes,
            heads=heads,
            window=window,
            dropout=dropout[2:],
            drop_path=drop_path,
            mask_padding=mask_padding,
        )
        self.pred_heads = nn.ModuleList(PredictionHead(widths, num_classes, flat, dropout) for flat in FLAT)
        for mode in range(len(FLAT)):
            # DDP waits for the gradient of every parameter that requires one
            self.embeddings[mode].requires_grad_(mode == self.resolution_mode)
            self.pred_heads[mode].requires_grad_(mode == self.resolution_mode)
        # read by nnU-Net's own transfer of encoders
        self.key_to_encoder, self.key_to_stem = "pyramid_ct", f"embeddings.{self.resolution_mode}"
        self.keys_to_in_proj, self.key_to_lpe = [f"embeddings.{self.resolution_mode}.proj"], None

    @property
    def decoder(self) -> PCTNet:
        """Return this network, for nnU-Net's deep supervision. No module, so that names stay as published."""
        return self

    @property
    def embedding(self) -> PatchEmbedding:
        """Return the embedding that the strides choose."""
        return self.embeddings[self.resolution_mode]  # type: ignore[return-value]

    @property
    def output_layers(self) -> list[OutputLayer]:
        """Return the output layers, full resolution first."""
        head, pyramid = self.pred_heads[self.resolution_mode], self.pyramid_ct
        return [head.out_conv0, head.out_conv1, pyramid.out_conv2, pyramid.out_conv3]  # type: ignore[list-item]

    @staticmethod
    def strides_for(spacing: Sequence[float]) -> list[list[int]]:
        """Choose strides for a spacing, thick axis first."""
        flat = [strides[0] == 1 for strides in halving_strides(spacing, 2)[1:]]
        return [list(stride) for stride in STRIDES[sum(flat)]]

    def encode(self, image: Tensor, levels: int = 5) -> list[Tensor]:
        """Encode (B, C, D, H, W) to maps, finest first."""
        maps = self.embedding(image, levels)
        return maps if levels < 3 else [*maps[:2], *self.pyramid_ct.encode(maps[2], levels - 2)]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment (B, C, D, H, W) at one or several levels."""
        return self.decode(self.encode(image))

    def decode(self, encoded: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Segment at one or several levels from the maps of ``encode``."""
        level2, level3 = self.pyramid_ct.decode(encoded[2:])
        level0, level1 = self.pred_heads[self.resolution_mode](encoded[0], encoded[1], level2)
        if not self.deep_supervision:
            return self.output_layers[0](level0)
        maps = (level0, level1, level2, level3)
        return [layer(decoded) for layer, decoded in zip(self.output_layers, maps, strict=True)]


def published_name(name: str) -> str:
    """Rename a published file's tensor.

    Only the four final convolutions differ: stock nnU-Net transfers everything but names with ``.seg_layers.``.
    """
    return PUBLISHED_HEAD.sub(HEAD, name)


def trained_modes(weights: Mapping[str, Tensor]) -> list[int]:
    """List the resolution modes that were trained. Their norms have counted batches."""
    counted = "embeddings.{}.conv0.conv_conv.0.num_batches_tracked"
    counts = [weights.get(counted.format(mode)) for mode in range(len(FLAT))]
    return [mode for mode, count in enumerate(counts) if count is not None and count > 0]
