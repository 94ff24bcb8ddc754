"""Files as 3DINO and MIS-FM publish them, and our own networks, into networks that plans build."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnssl_ext.networks.architectures.pct_net import STRIDES, PCTNet
from nnssl_ext.networks.architectures.vit import ViTUNETR
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.transfer.adaptations import input_channels
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import ADAPTED, COPIED, LEFT
from nnssl_ext.transfer.transfer import TargetNetwork, transfer
from tests.support.layouts import SMALL, encoder_layout, published_layout, random_weights

MILLIMETRE = (1.0, 1.0, 1.0)


@pytest.fixture
def vit_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A narrow transformer of 4 blocks in 2 groups, with an objective's head beside it."""
    published = {f"backbone.{name}": value for name, value in random_weights(encoder_layout(1, 16, 4, 2)).items()}
    torch.save({"teacher": {**published, "dino_head.last_layer.weight": torch.zeros(3, 4)}}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth", published


def vit_target(channels: int = 1, **options: Any) -> TargetNetwork:
    torch.manual_seed(1)
    chosen = {"embed_dim": 16, "depth": 4, "num_heads": 2, "decoder_features": 4, **options}
    return TargetNetwork(ViTUNETR(input_channels=channels, num_classes=3, **chosen), MILLIMETRE, (96, 96, 96))


def test_3dinos_transformer(vit_file: tuple[Path, dict[str, Tensor]]) -> None:
    file, published = vit_file
    target = vit_target()
    report = transfer(read_source(str(file)), target)
    encoder = {row.name: row for row in report.rows if row.name.startswith("backbone.")}
    assert {row.action for row in encoder.values()} == {COPIED}
    assert {row.action for row in report.rows if row.name not in encoder} == {LEFT}
    assert report.filled == sum(p.numel() for p in target.network.get_submodule("backbone").parameters())
    after = target.network.state_dict()
    assert torch.equal(after["backbone.blocks.2.attn.qkv.weight"], published["backbone.blocks.1.2.attn.qkv.weight"])
    assert torch.equal(after["backbone.pos_embed"], published["backbone.pos_embed"])


def test_3dinos_transformer_with_other_channels_tokens_and_grid(vit_file: tuple[Path, dict[str, Tensor]]) -> None:
    file, published = vit_file
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    target = vit_target(2, strides=strides, position_grid=(4, 4, 4))
    report = transfer(read_source(str(file)), target)
    notes = {row.name: row.note for row in report.rows if row.action == ADAPTED}
    assert notes == {
        "backbone.patch_embed.proj.weight": "patch 16x16x16 -> 8x16x16, resampled, image channels 1 -> 2, repeated "
        "and rescaled",
        "backbone.pos_embed": "positions 7x7x7 -> 4x4x4, interpolated",
    }
    after = target.network.state_dict()
    expected = resize_positions(published["backbone.pos_embed"], (7, 7, 7), (4, 4, 4), 1)
    assert torch.equal(after["backbone.pos_embed"], expected)
    assert torch.equal(after["backbone.pos_embed"][:, 0], published["backbone.pos_embed"][:, 0])
    weight = after["backbone.patch_embed.proj.weight"]
    assert torch.equal(weight[:, 0], weight[:, 1])


@pytest.mark.parametrize("mode", [0, 2])
def test_mis_fms_pct_net(tmp_path: Path, mode: int) -> None:
    published = random_weights(published_layout(1, 2, SMALL, (2, 2, 4), 2))
    whole = ("num_batches_tracked", "relative_position_index")
    integers = {name: value.long() * 0 for name, value in published.items() if name.endswith(whole)}
    torch.save({"model_state_dict": {**published, **integers}, "epoch": 3}, tmp_path / "pct.pt")
    torch.manual_seed(1)
    network = PCTNet(
        input_channels=2,
        num_classes=5,
        strides=STRIDES[mode],
        features_per_stage=SMALL,
        heads=[2, 2, 4],
        window=2,
    )
    report = transfer(read_source(str(tmp_path / "pct.pt")), TargetNetwork(network, MILLIMETRE, (32, 32, 32)))
    after, stem = network.state_dict(), f"embeddings.{mode}.proj.weight"
    for row in report.rows:
        if ".seg_layers." in row.name or (row.name.endswith("proj.weight") and row.name[:12] in OTHERS[mode]):
            assert row.action == LEFT, row.name
        elif row.name == stem:
            assert row.action == ADAPTED
            assert torch.equal(after[stem], input_channels(published[stem], 2))
        elif row.name in published and published[row.name].is_floating_point():
            assert row.action == COPIED, row.name
            if row.name not in integers:
                assert torch.equal(after[row.name], published[row.name]), row.name


#: Embeddings that the strides do not choose: nothing reads the image through them.
OTHERS = {mode: [f"embeddings.{other}" for other in range(3) if other != mode] for mode in range(3)}


def test_our_own_networks_into_each_other(tmp_path: Path) -> None:
    given = vit_target()
    torch.save({"network_weights": given.network.state_dict()}, tmp_path / "own.pth")
    target = vit_target(position_grid=(4, 4, 4))
    with torch.no_grad():
        for parameter in target.network.parameters():
            parameter.add_(1.0)
    report = transfer(read_source(str(tmp_path / "own.pth")), target)
    left = {row.name for row in report.rows if row.action == LEFT}
    assert left == {row.name for row in report.rows if ".seg_layers." in row.name}
    assert [row.name for row in report.rows if row.action == ADAPTED] == ["backbone.pos_embed"]
