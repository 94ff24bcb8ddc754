from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2, PrimusV3
from torch import Tensor, nn

from nnssl_ext.networks.backbone import backbone_of

KINDS = [Primus, PrimusV2, PrimusV3]
#: The smallest; later versions embed in a fixed width of eight voxels.
SMALL = {"embed_dim": 72, "num_classes": 3, "eva_depth": 2, "eva_numheads": 6, "input_shape": (16, 24, 16)}


def small(kind: type[nn.Module] = Primus, **options: object) -> Any:
    torch.manual_seed(0)
    return kind(input_channels=1, patch_embed_size=(8, 8, 8), **{**SMALL, **options}).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_its_own_decoder_gets(kind: type[nn.Module]) -> None:
    network, image = small(kind), torch.randn(2, 1, 16, 24, 16)
    backbone = backbone_of(network)
    assert backbone.strides == [(8, 8, 8)]
    seen: list[Tensor] = []
    network.get_submodule("up_projection").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(image)
    (features,) = backbone.features(image)
    assert features.shape == (2, *backbone.channels, 2, 3, 2)
    assert torch.allclose(features, seen[0], atol=1e-6)


def test_other_grids_stretch_the_positions() -> None:
    backbone = backbone_of(small())
    (small_map,) = backbone.features(torch.randn(1, 1, 8, 16, 8))
    assert small_map.shape[2:] == (1, 2, 1)
    # the same voxels everywhere: only positions tell tokens apart, and corners stay corners
    corners = [(0, 0, 0), (-1, 0, -1), (-1, -1, -1)]
    native, fine = (backbone.features(torch.ones(1, 1, *size))[0] for size in ((16, 24, 16), (32, 48, 32)))
    for corner in corners:
        here, there = (maps[(0, slice(None), *corner)] for maps in (native, fine))
        others = native[0].flatten(1).T
        assert (others - there).norm(dim=1).argmin() == (others - here).norm(dim=1).argmin()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_networks_own_and_fits_other_grids(kind: type[nn.Module]) -> None:
    network, image = small(kind, num_register_tokens=2), torch.randn(1, 1, 16, 24, 16)
    backbone = backbone_of(network)
    assert torch.equal(backbone.output(image), network(image))
    other = torch.randn(1, 1, 32, 16, 24)
    maps, output = backbone.features_and_output(other)
    assert output.shape == (1, 3, 32, 16, 24)
    assert torch.equal(output, backbone.output(other))
    assert torch.equal(maps[0], backbone.features(other)[0])


def test_the_decoder_is_a_head_and_the_encoder_is_all_the_rest() -> None:
    network = small(num_register_tokens=2)
    backbone = backbone_of(network)
    assert backbone.features(torch.randn(1, 1, 16, 24, 16))[0].shape[2:] == (2, 3, 2)
    encoder = {id(p) for p in backbone.encoder_parameters()}
    for name, parameter in network.named_parameters():
        assert (id(parameter) in encoder) != backbone.is_head(name), name
    backbone.train_encoder_only()
    assert {n for n, p in network.named_parameters() if not p.requires_grad} == {
        n for n, _ in network.named_parameters() if n.startswith("up_projection.")
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("registers", [0, 2])
def test_masked_tokens_are_left_out(kind: type[nn.Module], registers: int) -> None:
    """With every token visible nothing changes. Masked tokens change nothing else, and the mask token stands there."""
    network, image = small(kind, num_register_tokens=registers), torch.randn(2, 1, 16, 24, 16)
    backbone = backbone_of(network)
    everything = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(backbone.visible_output(image, everything), network(image), atol=1e-5, rtol=1e-4)
        visible = torch.tensor([[0, 5, 7], [1, 2, 11]])
        seen: list[Tensor] = []
        network.get_submodule("up_projection").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        backbone.visible_output(image, visible)
        # the published way: the network drops the same tokens by itself
        eva = network.get_submodule("eva")
        tokens = network.get_submodule("down_projection")(image)
        published = tokens.flatten(2).transpose(1, 2)
        if registers:
            published = torch.cat([network.register_tokens.expand(2, -1, -1), published], 1)
        published = published + eva.pos_embed
        index = torch.cat([torch.arange(registers).expand(2, -1), visible + registers], 1)
        for b in range(2):
            row, rope = published[b : b + 1, index[b]], eva.rope.get_embed()[visible[b]]
            for block in eva.blocks:
                row = block(row, rope=rope)
            mine = seen[0][b].flatten(1).T
            torch.testing.assert_close(mine[visible[b]], eva.norm(row)[0, registers:], atol=1e-5, rtol=1e-4)
            masked = sorted(set(range(12)) - set(visible[b].tolist()))
            assert torch.equal(mine[masked], network.mask_token[0].expand(len(masked), -1))


def test_illegal_edges_are_named() -> None:
    assert "multiple of 8" in backbone_of(small()).crop_problem((16, 20, 16))
    assert backbone_of(small()).crop_problem((16, 24, 16)) == ""
