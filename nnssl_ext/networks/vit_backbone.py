"""Define the backbone of the vision transformer.

B batch, C channel, D H W voxels, d h w tokens per axis, N = d h w tokens, E width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from nnssl_ext.networks.architectures.vit import ViTUNETR, as_map
from nnssl_ext.networks.base import Backbone, Decode, LearnedPositions, edges_problem


class ViTBackbone(Backbone):
    """Give access to a ``ViTUNETR``.

    Its encoder has one stage, the tokens.

    Args:
        network: The network. It is not owned.
    """

    is_transformer = True
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
        """Return the normed tokens without CLS as a map, [(B, E, d, h, w)]."""
        tokens = self.tokens(image)[:, 1:]
        return [as_map(tokens, self.encoder.grid(image.shape[2:]))][:stages]

    def features_and_output(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        patches = [layer[:, 1:] for layer in self.encoder.layers(image, self.network.read)]
        maps = [as_map(patches[-1], self.encoder.grid(image.shape[2:]))]
        return maps, self.network.decode(image, patches)  # type: ignore[return-value]

    def tokens(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the normed tokens, CLS first: (B, C, D, H, W) -> (B, 1 + N, E).

        Args:
            image: Its edges are multiples of the token's. Positions are resized to its grid.
            mask: (B, N) bool. Where true, the mask token replaces a patch. None masks nothing.
        """
        return self.encoder(image, mask)

    def visible_output(self, image: Tensor, visible: Tensor, decode: Decode | None = None) -> Tensor:
        return self.network(image, visible, decode)

    def train_mask_token(self) -> None:
        """Train the mask token."""
        self.encoder.mask_token.requires_grad_(True)

    def learned_positions(self) -> LearnedPositions:
        return LearnedPositions(self.encoder.pos_embed, self.encoder.position_grid, 1)

    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        return self.encoder.parameters()

    def layers(self) -> list[list[nn.Parameter]]:
        """Return parameters of the embedding, then block by block. The last norm belongs to the last block."""
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

    def drop_depth_strides(self) -> None:
        raise ValueError("A vision transformer has tokens of fixed edges: its strides cannot be dropped. Use a U-Net.")
