import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnssl_ext.networks.architectures.vit import Attention, VisionTransformer, ViTUNETR, published_name
from nnssl_ext.networks.vit_backbone import ViTBackbone
from tests.support.layouts import encoder_layout

SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
Shape = tuple[int, ...]


def small(**options: Any) -> ViTUNETR:
    torch.manual_seed(0)
    chosen = {"embed_dim": 16, "depth": 4, "num_heads": 2, "decoder_features": 4, **options}
    return ViTUNETR(input_channels=1, num_classes=3, **chosen)


@pytest.mark.parametrize("chunks", [0, 4])
def test_a_file_with_the_published_layout_loads_strictly(tmp_path: Path, chunks: int) -> None:
    """3DINO's: ``teacher`` holds the large encoder, its blocks in four groups, and the objective's heads."""
    layout = encoder_layout(1, 1024, 24, chunks)
    # one element, expanded: the shapes of 300 M parameters without their memory
    teacher = {f"backbone.{name}": torch.zeros(()).expand(shape) for name, shape in layout.items()}
    teacher |= {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": teacher}, tmp_path / "weights.pth")
    content = torch.load(tmp_path / "weights.pth", weights_only=True)["teacher"]
    with torch.device("meta"):
        network = ViTUNETR(input_channels=1, num_classes=2, **SIZES["large"])
    encoder = {
        published_name(name).removeprefix("backbone."): tensor
        for name, tensor in content.items()
        if name.startswith("backbone.")
    }
    network.backbone.load_state_dict(encoder, strict=True, assign=True)
    assert set(encoder_layout(1, 1024, 24, 0)) == set(network.backbone.state_dict())


@pytest.mark.parametrize(("size", "encoder"), [("small", 23_009_664), ("base", 88_486_656), ("large", 306_910_208)])
def test_parameters(size: str, encoder: int) -> None:
    with torch.device("meta"):
        network = ViTUNETR(input_channels=1, num_classes=2, **SIZES[size])
    width = SIZES[size]["embed_dim"]
    assert sum(p.numel() for p in network.backbone.parameters()) == encoder
    layout = encoder_layout(1, width, SIZES[size]["depth"], 0)
    assert {k: tuple(v.shape) for k, v in network.backbone.state_dict().items()} == layout
    assert network.read == [SIZES[size]["depth"] * share // 4 for share in (1, 2, 3, 4)]


def test_names_of_the_decoder_are_frozen() -> None:
    names = [name for name in small().state_dict() if name.startswith("decoder.")]
    parts = {re.sub(r"\.\d+", "", name.removeprefix("decoder.")).split(".")[0] for name in names}
    assert parts == {"image", "lifts", "ups", "blocks", "seg_layers"}
    heads = [name for name in names if ".seg_layers." in name]
    assert heads == [f"decoder.seg_layers.{n}.{part}" for n in range(4) for part in ("weight", "bias")]
    assert "decoder.lifts.2.0.weight" in names
    assert "decoder.blocks.3.norm2.weight" in names


@pytest.mark.parametrize(
    ("strides", "size"),
    [
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (32, 48, 16)),
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]], (12, 32, 48)),
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 2]], (3, 32, 16)),
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], (8, 12, 20)),
    ],
)
def test_any_tokens_and_any_legal_patch(strides: list[list[int]], size: tuple[int, ...]) -> None:
    network = small(strides=strides)
    outputs = network(torch.randn(2, 1, *size))
    edges, total = [], torch.ones(3, dtype=torch.long)
    for step in strides[:-1]:
        total = total * torch.tensor(step)
        edges.append(tuple((torch.tensor(size) // total).tolist()))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, *edge) for edge in edges]
    network.decoder.deep_supervision = False
    assert tuple(network(torch.randn(2, 1, *size)).shape) == (2, 3, *size)


def test_without_deep_supervision_comes_the_first_of_all_outputs() -> None:
    network, image = small().eval(), torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        first = network(image)[0]
        network.decoder.deep_supervision = False
        assert torch.equal(network(image), first)


def test_positions_are_the_learned_ones_on_their_own_grid_and_resized_elsewhere() -> None:
    encoder = small(position_grid=(3, 4, 5)).backbone
    assert encoder.positions((3, 4, 5)) is encoder.pos_embed
    resized = encoder.positions((6, 4, 5))
    assert tuple(resized.shape) == (1, 1 + 120, 16)
    assert torch.equal(resized[:, 0], encoder.pos_embed[:, 0])
    # a ramp along an axis stays one
    ramp = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 16).flatten(1, 3)
    with torch.no_grad():
        encoder.pos_embed[:, 1:] = ramp
        found = encoder.positions((6, 8, 10))[:, 1:].view(6, 8, 10, 16)
    # as DINOv2 and 3DINO do: the scale is (6 + 0.1) / 3
    expected = ((torch.arange(6) + 0.5) * 3 / 6.1 - 0.5).clamp(0, 2)
    assert torch.allclose(found[:, 0, 0, 0], expected, atol=1e-6)
    assert torch.allclose(found, found[:, :1, :1, :1].expand_as(found))


def test_files_fit_every_patch() -> None:
    """Nothing depends on the patch, so stock's loader takes what was pretrained on another one."""
    network = small().eval()
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    with torch.no_grad():
        assert network(torch.randn(1, 1, 16, 32, 48))[0].shape[2:] == (16, 32, 48)
        assert network(torch.randn(1, 1, 112, 16, 32))[0].shape[2:] == (112, 16, 32)
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(0)
    attention, tokens = Attention(width=8, heads=2), torch.randn(3, 5, 8)
    query, key, value = attention.qkv(tokens).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weight = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    expected = attention.proj((weight @ value).permute(0, 2, 1, 3).reshape(3, 5, 8))
    assert torch.allclose(attention(tokens), expected, atol=1e-6)


def masked(backbone: ViTBackbone, image: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return backbone.tokens(image, mask)


def test_tokens_with_cls_and_hidden_ones() -> None:
    backbone = ViTBackbone(small().eval())
    torch.nn.init.normal_(backbone.encoder.mask_token)
    image, mask = torch.randn(2, 1, 32, 32, 16), torch.zeros(2, 4, dtype=torch.bool)
    plain = masked(backbone, image, None)
    assert tuple(plain.shape) == (2, 5, 16)
    with torch.no_grad():
        (features,) = backbone.features(image)
    assert torch.equal(features.flatten(2).transpose(1, 2), plain[:, 1:])
    assert torch.equal(masked(backbone, image, mask), plain)

    # what is hidden cannot be seen: other voxels there change nothing
    mask[0, 3] = True
    other = image.clone()
    other[0, :, 16:, 16:] = 7.0
    assert torch.equal(masked(backbone, other, mask), masked(backbone, image, mask))
    assert not torch.allclose(masked(backbone, image, mask)[0], plain[0])
    assert torch.equal(masked(backbone, image, mask)[1], plain[1])
    everything = masked(backbone, image, torch.ones_like(mask))
    assert torch.allclose(everything[0], everything[1], atol=1e-6)


def test_the_mask_token_learns_only_where_it_is_used() -> None:
    backbone = ViTBackbone(small())
    assert not backbone.encoder.mask_token.requires_grad
    backbone.train_mask_token()
    backbone.tokens(torch.randn(1, 1, 32, 32, 32), torch.ones(1, 8, dtype=torch.bool)).square().sum().backward()
    assert backbone.encoder.mask_token.grad is not None
    assert backbone.encoder.mask_token.grad.abs().sum() > 0


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = small(checkpointing=checkpointing, drop_path=0.5, layer_scale=1.0).train()
        torch.manual_seed(1)
        network(torch.randn(3, 1, 32, 16, 16))[0].square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_drop_path_leaves_branches_out_while_training_alone() -> None:
    encoder = VisionTransformer(
        input_channels=1, patch=(8, 8, 8), width=16, depth=2, heads=2, drop_path=0.5, layer_scale=1.0
    )
    image = torch.randn(1, 1, 16, 16, 16)
    assert not torch.equal(encoder(image), encoder(image))
    encoder.eval()
    assert torch.equal(encoder(image), encoder(image))


def test_what_fits_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of \(16, 16, 16\), got \(32, 20, 32\)"):
        small()(torch.randn(1, 1, 32, 20, 32))
    with pytest.raises(ValueError, match="triples of 1 or 2, got"):
        small(strides=[[1, 1, 1], [4, 4, 4], [2, 2, 2]])
    with pytest.raises(ValueError, match="a depth of at least 4, .* got 2"):
        small(depth=2)
    with pytest.raises(ValueError, match="multiple of num_heads, got 16 and 3"):
        small(num_heads=3)
    problem = ViTBackbone(small()).crop_problem((32, 40, 32))
    assert problem.endswith("it must be a multiple of 16, at least 16; use 32 or 48")
    assert "one voxel at the token grid" in ViTBackbone(small()).crop_problem((16, 16, 16))


def test_masked_patches_are_left_out() -> None:
    """Visible tokens attend to each other alone, and the mask token stands for all others."""
    size = (32, 32, 48)
    network, image = small().eval(), torch.randn(2, 1, *size)
    encoder = network.backbone
    count = int(np.prod(encoder.grid(size)))
    with torch.no_grad():
        encoder.mask_token.normal_()
        whole, dropped = network(image), network(image, torch.arange(count).expand(2, -1))
        for a, b in zip(whole, dropped, strict=True):
            torch.testing.assert_close(a, b)
        visible = torch.tensor([[0, 2, 3], [1, 2, count - 1]])
        depth = len(encoder.blocks)
        (found,) = encoder.visible_layers(image, [depth], visible)
        for b in range(2):
            tokens = encoder.embed(image)[b : b + 1, [0, *(visible[b] + 1)]]
            for block in encoder.blocks:
                tokens = block(tokens)
            torch.testing.assert_close(found[b, [0, *(visible[b] + 1)]], encoder.norm(tokens)[0])
            masked = [place for place in range(count) if place not in visible[b]]
            assert torch.equal(found[b, [place + 1 for place in masked]], encoder.mask_token.expand(len(masked), -1))
