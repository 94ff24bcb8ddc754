"""How a method sees the vision transformer: one map of tokens, and the tokens themselves.

B batch, C channel, D H W voxels, d h w tokens per axis, N = d h w tokens, E width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from nnssl_ext.networks.architectures.vit import ViTUNETR, as_map
from nnssl_ext.networks.base import Backbone, LearnedPositions, edges_problem


class ViTBackbone(Backbone):
    """A ``ViTUNETR``; its encoder has one stage, the tokens.

    Args:
        network: The network; it is looked at, not owned.
    """

    network: ViTUNETR

    def __init__(self, network: ViTUNETR) -> None:
        super().__init__(network)
        self.encoder = network.backbone

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return [self.encoder.patch]

    @property
    def channels(self) -> list[int]:
        return [self.encoder.norm.normalized_shape[0]]

    @property
    def stem(self) -> nn.Conv3d:
        return self.encoder.patch_embed.proj

    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        """The normed tokens without CLS as a map, [(B, E, d, h, w)]."""
        tokens = self.tokens(image)[:, 1:]
        return [as_map(tokens, self.encoder.grid(image.shape[2:]))][:stages]

    def tokens(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normed tokens, CLS first: (B, C, D, H, W) -> (B, 1 + N, E).

        Args:
            image: Edges are multiples of the token's; positions are resized to its grid.
            mask: (B, N) bool; where true, the mask token takes the place of the voxels. None hides nothing.
        """
        return self.encoder(image, mask)

    def train_mask_token(self) -> None:
        """Put the mask token into the training, for an objective that hides tokens."""
        self.encoder.mask_token.requires_grad_(True)

    def learned_positions(self) -> LearnedPositions:
        return LearnedPositions(self.encoder.pos_embed, self.encoder.position_grid, 1)

    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        return self.encoder.parameters()

    def layers(self) -> list[list[nn.Parameter]]:
        """What makes tokens, then block by block; the last norm belongs to the last block."""
        encoder = self.encoder
        blocks = [list(block.parameters()) for block in encoder.blocks]
        blocks[-1] += list(encoder.norm.parameters())
        first = [encoder.cls_token, encoder.pos_embed, encoder.mask_token, *encoder.patch_embed.parameters()]
        return [first, *blocks]

    def blocks(self) -> Iterable[nn.Module]:
        decoder = self.network.decoder
        return [*self.encoder.blocks, decoder.image, *decoder.lifts, *decoder.blocks]

    def crop_problem(self, size: Sequence[int]) -> str:
        return edges_problem(size, self.encoder.patch, self.encoder.patch, "token grid")

    def freeze_coarse_heads(self) -> None:
        for head in list(self.network.decoder.seg_layers)[:-1]:
            head.requires_grad_(False)

    def drop_depth_strides(self) -> None:
        raise ValueError("a vision transformer's tokens have fixed edges: its strides cannot be dropped; use a U-Net")
