"""Define the backbone of Primus.

Wald et al., "Primus: Enforcing Attention Usage for 3D Medical Image Segmentation", arXiv 2503.01835. The
setting ``nnssl_ext.target_trainer`` names the trainer that builds it.

B batch, C channel, D H W voxels, d h w tokens per axis, N = d h w tokens, E width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from dynamic_network_architectures.architectures.primus import Primus
from timm.layers import build_rotary_pos_embed
from torch import Tensor, nn

from nnssl_ext.networks.base import Backbone, Decode, LearnedPositions, edges_problem
from nnssl_ext.networks.positions import resize_positions

#: Image edges from which a token's edges are measured. Every published token divides them.
PROBE = 32


class PrimusBackbone(Backbone):
    """Give access to a ``Primus`` of any version.

    Its encoder has one stage, the tokens.

    Images may have another grid than the network's own.
    """

    is_transformer = True
    network: Primus

    def __init__(self, network: Primus) -> None:
        super().__init__(network)
        stem = self.stem.weight
        with torch.no_grad():
            tokens = network.down_projection(stem.new_zeros(1, stem.shape[1], PROBE, PROBE, PROBE))
        self.token = tuple(PROBE // edge for edge in tokens.shape[2:])

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return [self.token]

    @property
    def channels(self) -> list[int]:
        return [self.network.embed_dim]

    @property
    def stem(self) -> nn.Conv3d:
        return next(module for module in self.network.down_projection.modules() if isinstance(module, nn.Conv3d))

    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        """Return the normed tokens as a map, [(B, E, d, h, w)]. Positions are resized to the image's grid."""
        return [self._encode(image)][:stages]

    def output(self, image: Tensor) -> Tensor:
        """Segment an image of any token grid: (B, C, D, H, W) -> (B, classes, D, H, W)."""
        return self.features_and_output(image)[1]

    def features_and_output(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = self.features(image)
        return maps, self.network.up_projection(maps[0])

    def visible_output(self, image: Tensor, visible: Tensor, decode: Decode | None = None) -> Tensor:
        return self.network.up_projection(self._encode(image, visible, decode))

    def _encode(self, image: Tensor, visible: Tensor | None = None, decode: Decode | None = None) -> Tensor:
        """Encode tokens into a map.

        Without those that are not ``visible`` (B, V), if given. The mask token then stands for them, and ``decode``
        changes all tokens.
        """
        network, eva = self.network, self.network.eva
        tokens = network.down_projection(image)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        registers = 0
        if network.register_tokens is not None:
            registers = network.register_tokens.shape[1]
            tokens = torch.cat([network.register_tokens.expand(len(tokens), -1, -1), tokens], 1)
        if eva.pos_embed is not None:
            tokens = tokens + self._positions(grid, registers)
        tokens, rotary = eva.pos_drop(tokens), self._rotary(grid)
        if visible is not None:
            index = visible[..., None].expand(-1, -1, tokens.shape[2])
            full = network.mask_token.to(tokens.dtype).expand(len(tokens), tokens.shape[1] - registers, -1)
            tokens = torch.cat([tokens[:, :registers], tokens[:, registers:].gather(1, index)], 1)
            rotary = None if rotary is None else rotary[visible][:, None]  # (B, 1, V, ...), equal for all heads
        for block in eva.blocks:
            tokens = block(tokens, rope=rotary)
        tokens = eva.norm(tokens)[:, registers:]
        if visible is not None:
            tokens = full.to(tokens.dtype).scatter(1, index, tokens)
        if decode is not None:
            tokens = decode(tokens)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def learned_positions(self) -> LearnedPositions | None:
        eva, registers = self.network.eva, self.network.register_tokens
        if eva.pos_embed is None or eva.rope is None:  # without rotary positions its grid is unknown
            return None
        return LearnedPositions(
            eva.pos_embed, tuple(eva.rope.ref_feat_shape), 0 if registers is None else registers.shape[1]
        )

    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        return [parameter for layer in self.layers() for parameter in layer]

    def layers(self) -> list[list[nn.Parameter]]:
        """Return parameters of the embedding, then block by block. The last norm belongs to the last block."""
        network, eva = self.network, self.network.eva
        first = [*network.down_projection.parameters(), eva.pos_embed, network.register_tokens]
        blocks = [list(block.parameters()) for block in eva.blocks]
        blocks[-1] += list(eva.norm.parameters())
        return [[parameter for parameter in first if parameter is not None], *blocks]

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.network.eva.blocks, self.network.up_projection]

    def is_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the decoder. Its widths depend on the classes."""
        return name.startswith("up_projection.")

    def crop_problem(self, size: Sequence[int]) -> str:
        return edges_problem(size, self.token, self.token, "token grid")

    def freeze_coarse_heads(self) -> None:
        """Do nothing: there is one output."""

    def set_deep_supervision(self, enabled: bool) -> None:
        """Do nothing: there is one output."""

    def drop_depth_strides(self) -> None:
        raise ValueError("Primus has tokens of fixed edges, so its strides cannot be dropped. Use a U-Net.")

    def _positions(self, grid: Sequence[int], registers: int) -> Tensor:
        """Return learned positions resized to a token grid. (1, registers + N, E)"""
        eva = self.network.eva
        own = tuple(grid) if eva.rope is None else tuple(eva.rope.ref_feat_shape)
        return resize_positions(eva.pos_embed, own, grid, registers)

    def _rotary(self, grid: Sequence[int]) -> Tensor | None:
        """Return rotary positions stretched to a grid."""
        rope = self.network.eva.rope
        if rope is None or tuple(grid) == tuple(rope.ref_feat_shape):
            return None if rope is None else rope.get_embed()
        values = build_rotary_pos_embed(
            feat_shape=list(grid),
            dim=rope.dim,
            max_res=rope.max_res,
            temperature=rope.temperature,
            linear_bands=rope.linear_bands,
            in_pixels=rope.in_pixels,
            ref_feat_shape=list(rope.ref_feat_shape),
            grid_offset=rope.grid_offset,
            grid_indexing=rope.grid_indexing,
            device=rope.pos_embed.device,
        )
        return torch.cat(values, -1)
