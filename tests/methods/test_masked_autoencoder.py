from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from torch import nn

from nnssl_ext.errors import UserError
from nnssl_ext.methods import DataGeometry
from nnssl_ext.methods.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderSettings, default_block
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.networks.heads import sine_positions
from nnssl_ext.networks.visible_norms import VisibleNorms
from nnssl_ext.views.masking import block_moments, expand_blocks
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.methods.helpers import CPU, OFF, SIZE, batch_of, build, views_of
from tests.support.networks import network

#: No augmentation.
BARE = replace(MaskedAutoencoderSettings(), flip=0, rot90=0, affine=0, intensity=OFF, block_size=[4, 4, 4])


def test_hidden_blocks_are_zero_and_are_the_targets(folder: Path) -> None:
    method = build(MaskedAutoencoder, BARE)
    batch = batch_of(folder, method, [0, 1])
    views = method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU))
    original = torch.stack([box.data for box in batch.boxes[0]])
    torch.testing.assert_close(views["target"], original)
    hidden = (views["image"] == 0).all(1, keepdim=True)
    assert hidden.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(views["image"], original * ~hidden)
    assert not (views["weight"].bool() & ~hidden).any()
    assert views["weight"].mean() > 0.5


def test_the_control_of_normalized_blocks_is_normalized_after_shuffling(folder: Path) -> None:
    method = build(MaskedAutoencoder, replace(BARE, normalize_target=True)).eval()
    batch = batch_of(folder, method, [0, 1])
    views = method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU))
    original = torch.stack([box.data for box in batch.boxes[0]])
    visible = views["shuffled"][views["shuffled"] != 0]
    assert torch.isin(visible, original).all()  # the input is a shuffled image, not shuffled targets
    mean, variance = block_moments(views["shuffled_target"], method.block_size)
    assert mean.abs().max() < 1e-3
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("size", "spacing", "expected"),
    [
        ((128, 128, 128), (1.0, 1.0, 1.0), [16, 16, 16]),
        ((160, 192, 64), (1.0, 1.0, 1.0), [16, 16, 16]),
        ((16, 256, 256), (5.0, 1.25, 1.25), [4, 16, 16]),
        ((40, 56, 40), (1.0, 1.0, 1.0), [10, 14, 10]),
        ((3, 64, 64), (10.0, 1.0, 1.0), [1, 16, 16]),
    ],
)
def test_default_blocks_are_sixteen_voxels_of_the_finest_axis_in_mm(
    size: tuple, spacing: tuple, expected: list[int]
) -> None:
    assert default_block(DataGeometry(size, spacing, 1)) == expected


def test_visible_norms_do_not_depend_on_masked_voxels() -> None:
    network = nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.Conv3d(2, 3, 2, 2), nn.InstanceNorm3d(3))
    image = torch.randn(2, 2, 8, 8, 8)
    expected, keys = network(image), list(network.state_dict())
    norms = VisibleNorms(network)
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(network(image), expected)  # without a mask
    norms.mask = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-4)
    norms.mask = expand_blocks(torch.rand(2, 1, 4, 4, 4) < 0.5, (8, 8, 8), (2, 2, 2))
    changed = image + 5 * ~norms.mask
    visible = norms.mask[:, :, ::2, ::2, ::2].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(network(image)[visible], network(changed)[visible], atol=1e-4, rtol=1e-4)
    norms.mask = None
    assert not torch.allclose(network(image)[visible], network(changed)[visible], atol=1e-2)


@pytest.mark.parametrize("kind", ["pct_net", "primus"])
def test_visible_norms_need_instance_norms(kind: str) -> None:
    geometry = DataGeometry((16, 16, 16), (1.0, 1.0, 1.0), 1, ((8, 8, 8),))
    size: dict[str, Any] = {"embed_dim": 72, "eva_depth": 1, "eva_numheads": 6, "input_shape": (16, 16, 16)}
    net = Primus(1, patch_embed_size=(8, 8, 8), num_classes=1, **size) if kind == "primus" else network(kind)
    settings = MaskedAutoencoderSettings(visible_norms=True, drop_masked_tokens=False)
    with pytest.raises(UserError, match=r"visible_norms: expected a network with instance norms, got P\w+ without any"):
        MaskedAutoencoder(backbone_of(net), settings, geometry)


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_visible_norms_train(folder: Path, kind: str) -> None:
    plain = build(MaskedAutoencoder, MaskedAutoencoderSettings(), kind=kind)
    method = build(MaskedAutoencoder, replace(MaskedAutoencoderSettings(), visible_norms=True), kind=kind)
    assert method.network.state_dict().keys() == plain.network.state_dict().keys()
    method(views_of(folder, method, [0, 1]))["loss"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_padding_and_flat_blocks_are_no_targets(folder: Path) -> None:
    method = build(MaskedAutoencoder, BARE)
    batch = batch_of(folder, method, [0, 1])
    for box in batch.boxes[0]:
        box.data, box.center = box.data[:, 4:].clone(), box.center - np.array([4, 0, 0])
        box.data[:, :4, :4, :4] = 0.5
    weight = method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU))["weight"]
    assert not weight[:, :, :4].any()
    assert not weight[:, :, 4:8, :4, :4].any()
    assert weight[:, :, 8:].any()


def test_targets_can_be_normalised_per_block(folder: Path) -> None:
    target = views_of(folder, build(MaskedAutoencoder, replace(BARE, normalize_target=True)), [0, 1])["target"]
    mean, variance = block_moments(target, (4, 4, 4))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-2, rtol=0)


def test_loss_counts_hidden_voxels_only(folder: Path) -> None:
    method = build(MaskedAutoencoder, BARE)
    views = views_of(folder, method, [0, 1])
    expected = ((method.network(views["image"]) - views["target"]) ** 2)[views["weight"].bool()]
    counts = views["weight"].sum((1, 2, 3, 4))
    loss = method(views)["loss"]
    torch.testing.assert_close((loss * counts).sum() / counts.sum(), expected.mean())
    views["target"] = views["target"] + 100 * (1 - views["weight"])
    torch.testing.assert_close(method(views)["loss"], loss)


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_encoder_decoder_and_the_finest_head_learn(folder: Path, kind: str) -> None:
    method = build(MaskedAutoencoder, MaskedAutoencoderSettings(), kind=kind)
    method(views_of(folder, method, [0, 1]))["loss"].sum().backward()
    without = {name for name, p in method.network.named_parameters() if p.grad is None}
    assert without == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    assert not any(p.requires_grad for name, p in method.network.named_parameters() if name in without)


def test_explained_variance_of_the_mean_is_zero_and_of_the_truth_is_one(folder: Path) -> None:
    method = build(MaskedAutoencoder, BARE).eval()
    views = views_of(folder, method, [0])
    weight, target = views["weight"], views["target"]
    mean = (target * weight).sum((2, 3, 4), keepdim=True) / weight.sum((2, 3, 4), keepdim=True)
    for answer, expected in ((target, 1.0), (mean.expand_as(target), 0.0)):
        method.network.forward = lambda image, a=answer: a
        assert method(views)["explained_variance"].item() == pytest.approx(expected, abs=1e-4)


def explained_after(folder: Path, shuffled: bool) -> float:
    """Explained variance on other crops after some steps, with the voxels of all crops shuffled or not."""
    method = build(MaskedAutoencoder, replace(BARE, mask_ratio=0.5))
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-2)

    def views(indices: list[int]) -> dict[str, torch.Tensor]:
        result = views_of(folder, method, indices)
        if shuffled:
            order = torch.randperm(SIZE[0] ** 3, generator=torch.Generator().manual_seed(indices[0]))
            target = result["target"].flatten(2)[:, :, order].view_as(result["target"])
            hidden = (result["image"] == 0).all(1, keepdim=True)
            result |= {"target": target, "image": target * ~hidden, "weight": hidden.float().expand_as(target)}
        return result

    for step in range(40):
        loss = method(views([2 * step, 2 * step + 1]))["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    method.eval()
    with torch.no_grad():
        return method(views([1000, 1001, 1002, 1003]))["explained_variance"].mean().item()


def test_it_learns_and_with_shuffled_voxels_it_does_not(folder: Path) -> None:
    assert explained_after(folder, False) > 0.15
    assert explained_after(folder, True) < 0.05


def test_constant_crops_give_a_finite_loss_and_explain_nothing(folder: Path) -> None:
    method = build(MaskedAutoencoder, MaskedAutoencoderSettings(normalize_target=True, intensity=OFF)).eval()
    batch = batch_of(folder, method, [0, 1])
    for box in batch.boxes[0]:
        box.data = torch.zeros_like(box.data)
    with torch.no_grad():
        result = method(method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU)))
    assert torch.isfinite(result["loss"]).all()
    assert result["explained_variance"].isnan().all()
    assert result["shuffled_variance"].isnan().all()


def test_a_block_may_be_longer_than_the_crop(folder: Path) -> None:
    """As the published one is, in plans with few slices."""
    method = build(MaskedAutoencoder, replace(BARE, block_size=[32, 4, 4])).eval()
    result = method(views_of(folder, method, [0, 1]))
    assert all(torch.isfinite(value).all() for value in result.values())


def test_expanding_blocks_is_exact() -> None:
    values = torch.arange(8.0).view(1, 2, 2, 2)
    assert expand_blocks(values, (3, 4, 4), (2, 2, 2))[0, 2, 3, 3] == 7


def test_a_transformer_leaves_out_masked_tokens(folder: Path) -> None:
    method = build(MaskedAutoencoder, MaskedAutoencoderSettings(intensity=OFF, mask_ratio=0.5), kind="vit")
    views = views_of(folder, method, [0, 1])
    token, masked = method.token, views["weight"][:, 0] > 0
    assert all(block % edge == 0 for block, edge in zip(method.block_size, token, strict=True))
    shown = torch.zeros_like(masked[:, :: token[0], :: token[1], :: token[2]]).flatten(1)
    shown.scatter_(1, views["tokens"], True)
    assert torch.equal(shown, ~masked[:, :: token[0], :: token[1], :: token[2]].flatten(1))
    method(views)["loss"].mean().backward()
    gradient = method.backbone.encoder.mask_token.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    # masked voxels are predicted from the visible ones: their error reaches every block of the encoder
    for block in method.backbone.encoder.blocks:
        assert block.attn.qkv.weight.grad.abs().sum() > 0


def test_positions_tell_tokens_apart() -> None:
    positions = sine_positions((3, 4, 2), 32)
    assert positions.shape == (1, 24, 32)
    assert len(positions[0].unique(dim=0)) == 24
    assert (positions[0, :, 30:] == 0).all()


def test_blocks_of_a_transformer_are_whole_tokens(folder: Path) -> None:
    geometry = DataGeometry((96, 96, 96), (1.0, 1.0, 1.0), 1)
    assert default_block(geometry, (16, 16, 16)) == [16, 16, 16]
    assert default_block(geometry, (8, 8, 8)) == [16, 16, 16]
    assert default_block(replace(geometry, crop_size=(24, 96, 80)), (8, 8, 8)) == [8, 16, 16]
    with pytest.raises(UserError, match=r"block_size: expected multiples of the tokens .* got \[3, 4, 4\]"):
        build(MaskedAutoencoder, MaskedAutoencoderSettings(block_size=[3, 4, 4]), kind="vit")
    build(MaskedAutoencoder, MaskedAutoencoderSettings(block_size=[3, 4, 4], drop_masked_tokens=False), kind="vit")
    for dropped in (True, False):  # a token that is half masked would show what is hidden
        method = build(MaskedAutoencoder, MaskedAutoencoderSettings(drop_masked_tokens=dropped), kind="vit")
        assert all(
            edge % token == 0 for edge, token in zip(method.block_size, method.backbone.strides[-1], strict=True)
        )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("vit", (3e-4, 0.05, 0.05, 1.0, (0.9, 0.98))), ("plain", (1e-3, 1e-5, 0.02, 12.0, (0.9, 0.999)))],
)
def test_transformers_have_their_own_recipe(folder: Path, kind: str, expected: tuple) -> None:
    method = build(MaskedAutoencoder, MaskedAutoencoderSettings(), kind=kind)
    recipe = method.optimizer()
    found = (recipe.learning_rate, recipe.weight_decay, recipe.warmup, recipe.max_grad_norm, recipe.betas)
    assert found == expected
    groups = method.parameter_groups()
    assert sum(len(group.parameters) for group in groups) == sum(p.requires_grad for p in method.parameters())
    plain = [p for group in groups if group.weight_decay_scale == 0 for p in group.parameters]
    assert bool(plain) == (kind == "vit")
    assert all(p.ndim < 2 or len(p) == 1 for p in plain)
    assert (
        build(MaskedAutoencoder, MaskedAutoencoderSettings(weight_decay=0.1), kind=kind).optimizer().weight_decay == 0.1
    )
