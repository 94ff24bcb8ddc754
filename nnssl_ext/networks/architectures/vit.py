"""Define a 3-D vision transformer and its segmentation network.

The encoder is the one of Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, in the form
and with the tensor names of Oquab et al., "DINOv2", TMLR 2024, arXiv 2304.07193: pre-norm blocks, LayerScale,
drop-path, a CLS token, learned absolute positions. The decoder is UNETR's (``nnssl_ext.networks.architectures.unetr``).

B batch, C channel, D H W voxels, d h w tokens per axis, N = d h w tokens, E width of a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.networks.activation_checkpointing import checkpoint_activations
from nnssl_ext.networks.architectures.blocks import DropPath, Mlp
from nnssl_ext.networks.architectures.unetr import UNETRDecoder
from nnssl_ext.networks.base import triple
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.networks.strides import halving_strides

EPSILON = 1e-6
#: DINOv2 and 3DINO interpolate positions with the scale (tokens + 0.1) / tokens of the table.
OFFSET = 0.1
#: Blocks in groups, as large models are published: group and number.
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
#: Four halvings: cubes of 16 voxels.
STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))


class Attention(nn.Module):
    """Apply self-attention among all tokens: (B, N, E) -> (B, N, E)."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, E / heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """Scale each feature, at first by little.

    Deep transformers then start near the identity.

    Touvron et al., "Going deeper with Image Transformers", ICCV 2021.
    """

    def __init__(self, *, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    """Add attention and a two-layer perceptron to the input: (B, N, E) -> (B, N, E)."""

    def __init__(self, *, width: int, heads: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width=width, heads=heads)
        self.ls1 = LayerScale(width=width, initial=layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width=width, initial=layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.drop_path(tokens, lambda own: self.ls1(self.attn(self.norm1(own))))
        return self.drop_path(tokens, lambda own: self.ls2(self.mlp(self.norm2(own))))


class PatchEmbed(nn.Module):
    """Embed disjoint patches as tokens: (B, C, D, H, W) -> (B, N, E)."""

    def __init__(self, *, input_channels: int, width: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(input_channels, width, triple(patch), triple(patch))

    def forward(self, image: Tensor) -> Tensor:
        # equals the convolution, as one matrix product: faster, above all in the backward pass
        grid = [edge // step for edge, step in zip(image.shape[2:], self.proj.stride, strict=True)]
        cut = [size for pair in zip(grid, self.proj.stride, strict=True) for size in pair]
        patches = image.unflatten(4, cut[4:]).unflatten(3, cut[2:4]).unflatten(2, cut[:2])
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, N, C voxels)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Compute the tokens of a volume, CLS first.

    Args:
        input_channels: C.
        patch: Edges of a token in voxels.
        width: E.
        depth: Number of blocks.
        heads: Attention heads of a block.
        mlp_ratio: Width of a block's perceptron, in E.
        layer_scale: Initial LayerScale.
        drop_path: Probability that a sample skips a block's branch in training.
        position_grid: Token grid of the learned positions. Another grid resizes them trilinearly.
        checkpointing: Recompute blocks in the backward pass. The setting ``activation_checkpointing`` does so for the
            decoder too, and for every network.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        patch: Sequence[int],
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        position_grid: Sequence[int] = (7, 7, 7),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Expected embed_dim to be a multiple of num_heads, got {width} and {heads}.")
        self.patch = tuple(patch)
        self.position_grid = tuple(position_grid)
        self.patch_embed = PatchEmbed(input_channels=input_channels, width=width, patch=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + int(np.prod(self.position_grid)), width))
        # segmentation masks no tokens: an objective that does sets requires_grad
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=drop_path)
            for _ in range(depth)
        )
        if checkpointing:
            checkpoint_activations(self.blocks)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self._initialise()

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of an image."""
        return tuple(edge // stride for edge, stride in zip(size, self.patch, strict=True))

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Resize the learned positions to a token grid: (1, 1 + N, E)."""
        return resize_positions(self.pos_embed, self.position_grid, grid, 1, OFFSET)

    def embed(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed (B, C, D, H, W) as (B, 1 + N, E). Where ``mask`` (B, N) is true, the mask token replaces a patch."""
        tokens = self.patch_embed(image)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        cls = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([cls, tokens], 1) + self.positions(self.grid(image.shape[2:]))

    def layers(self, image: Tensor, after: Sequence[int], mask: Tensor | None = None) -> list[Tensor]:
        """Return tokens (B, 1 + N, E) after given blocks. Numbers ascend. The last tokens are normed."""
        tokens, found = self.embed(image, mask), []
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if number in after:
                found.append(self.norm(tokens) if number == len(self.blocks) else tokens)
        return found

    def visible_layers(self, image: Tensor, after: Sequence[int], visible: Tensor) -> list[Tensor]:
        """Return ``layers`` of the visible patches alone, with the mask token for all others.

        He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

        Args:
            image: (B, C, D, H, W).
            after: Numbers of blocks, ascending.
            visible: (B, V) positions of the visible patches among N.
        """
        embedded = self.embed(image)
        width, found = embedded.shape[2], []
        index = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1], 1)[..., None].expand(-1, -1, width)
        tokens = embedded.gather(1, index)
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if number in after:
                kept = self.norm(tokens) if number == len(self.blocks) else tokens
                found.append(self.mask_token.to(kept.dtype).expand_as(embedded).scatter(1, index, kept))
        return found

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode (B, C, D, H, W) to normed tokens (B, 1 + N, E)."""
        return self.layers(image, [len(self.blocks)], mask)[0]

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class ViTUNETR(nn.Module):
    """Vision transformer with a UNETR decoder.

    Plans name it as ``nnssl_ext.networks.architectures.vit.ViTUNETR``. Hatamizadeh et al., "UNETR", WACV 2022, arXiv
    2103.10504. The decoder reads tokens after equal shares of the blocks: 1/4, 1/2, 3/4 and all with four halvings. Its
    heads are ``decoder.seg_layers``, which stock nnU-Net does not transfer. No tensor depends on the patch size.

    Args:
        input_channels: C.
        num_classes: Channels of an output.
        deep_supervision: Return all outputs, full resolution first.
        strides: Strides from stage to stage, each 1 or 2, the first (1, 1, 1). Their product is a token's edges.
        embed_dim, depth, num_heads, mlp_ratio, layer_scale, drop_path, position_grid, checkpointing: The encoder's.
        decoder_features: Channels of the decoder at full resolution.

    Raises:
        ValueError: For strides or widths that fit no network.

    Example:
        ``ViTUNETR(input_channels=1, num_classes=3)(torch.zeros(1, 1, 96, 96, 96))`` are four outputs.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        strides: Sequence[Sequence[int]] = STRIDES,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_path: float = 0.1,
        position_grid: Sequence[int] = (7, 7, 7),
        checkpointing: bool = False,
        decoder_features: int = 16,
    ) -> None:
        super().__init__()
        self.strides = checked_strides(strides, depth)
        self.backbone = VisionTransformer(
            input_channels=input_channels,
            patch=np.prod(self.strides, axis=0).tolist(),
            width=embed_dim,
            depth=depth,
            heads=num_heads,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            drop_path=drop_path,
            position_grid=position_grid,
            checkpointing=checkpointing,
        )
        levels = len(self.strides) - 1
        self.read = [depth * (level + 1) // levels for level in range(levels)]
        self.decoder = UNETRDecoder(
            input_channels=input_channels,
            num_classes=num_classes,
            width=embed_dim,
            strides=self.strides,
            features=decoder_features,
            deep_supervision=deep_supervision,
        )
        #: Layers of the decoder that see the image's channels.
        self.image_readers = ["decoder.image.conv1", "decoder.image.skip"]
        # read by nnU-Net's own transfer of encoders
        self.key_to_encoder, self.key_to_stem = "backbone", "backbone.patch_embed"
        self.keys_to_in_proj, self.key_to_lpe = ["backbone.patch_embed.proj"], "backbone.pos_embed"

    @staticmethod
    def strides_for(spacing: Sequence[float]) -> list[list[int]]:
        """Choose strides for tokens of about 16 voxels."""
        return halving_strides(spacing, len(STRIDES) - 1)

    def forward(
        self, image: Tensor, visible: Tensor | None = None, decode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """Segment (B, C, D, H, W), at one or all resolutions.

        ``visible`` (B, V) are the positions of the patches to encode; None encodes all. ``decode`` then changes the
        deepest tokens (B, N, E), in which the mask token stands for the others.
        """
        size = image.shape[2:]
        if any(edge % stride for edge, stride in zip(size, self.backbone.patch, strict=True)):
            raise ValueError(f"Expected image edges in multiples of {self.backbone.patch}, got {tuple(size)}.")
        encoder = self.backbone
        if visible is None:
            tokens = encoder.layers(image, self.read)
        else:
            tokens = encoder.visible_layers(image, self.read, visible)
        patches = [layer[:, 1:] for layer in tokens]
        if decode is not None:
            patches[-1] = decode(patches[-1])
        return self.decode(image, patches)

    def decode(self, image: Tensor, patches: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Segment at one or all resolutions, from tokens (B, N, E) after each of the blocks ``read``."""
        return self.decoder(image, [as_map(layer, self.backbone.grid(image.shape[2:])) for layer in patches])


def as_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Arrange tokens as a map: (B, N, E) -> (B, E, d, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def checked_strides(strides: Sequence[Sequence[int]], depth: int) -> tuple[tuple[int, ...], ...]:
    """Check strides and return them as tuples."""
    checked = tuple(tuple(step) for step in strides)
    if len(checked) < 3 or checked[0] != (1, 1, 1) or any(set(step) - {1, 2} or len(step) != 3 for step in checked):
        raise ValueError(
            f"Expected strides [1, 1, 1] and at least two triples of 1 or 2, got {list(map(list, checked))}."
        )
    if depth < len(checked) - 1:
        raise ValueError(f"Expected a depth of at least {len(checked) - 1}, the decoder's layers, got {depth}.")
    return checked


def published_name(name: str) -> str:
    """Rename a published encoder's tensor.

    Large models are published in groups whose blocks are numbered through (``blocks.1.6.``).
    """
    return "backbone." + CHUNKED.sub(r"blocks.\1.", name.removeprefix("backbone."))
