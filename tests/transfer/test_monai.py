"""MONAI's vision transformer, whose blocks have no LayerScale, in the segmentation network of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnssl_ext.networks.architectures.vit import ViTUNETR
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import ADAPTED, LEFT
from nnssl_ext.transfer.transfer import TargetNetwork, transfer
from tests.support.layouts import encoder_layout

EDGES = (32, 32, 32)


def monai_vit(**options: Any) -> Any:
    """Return a small one in which every tensor matters."""
    networks = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "mlp_dim": 64, "num_layers": 4, "num_heads": 2}
    network = networks.ViT(in_channels=1, img_size=EDGES, patch_size=16, **sizes, **options).eval()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    return network


def target(**options: Any) -> TargetNetwork:
    torch.manual_seed(1)
    chosen = {"embed_dim": 16, "depth": 4, "num_heads": 2, "decoder_features": 4, "position_grid": (2, 2, 2)}
    return TargetNetwork(ViTUNETR(input_channels=1, num_classes=3, **{**chosen, **options}), (1.0, 1.0, 1.0), EDGES)


def tokens_of(network: nn.Module, image: Tensor) -> Tensor:
    return network.get_submodule("backbone").eval()(image)


def test_its_tokens_are_those_of_monai(tmp_path: Path) -> None:
    theirs = monai_vit(classification=True, qkv_bias=True)
    torch.save(theirs.state_dict(), tmp_path / "monai.pth")
    source, to = read_source(str(tmp_path / "monai.pth")), target()
    assert source.kind == "MONAI's vision transformer"

    report = transfer(source, to)

    image = torch.randn(2, 1, *EDGES)
    with torch.no_grad():
        expected = theirs.norm(theirs(image)[1][-1])
        # the epsilons of the norms differ
        torch.testing.assert_close(tokens_of(to.network, image), expected, atol=1e-3, rtol=1e-3)
    encoder = [row for row in report.rows if row.name.startswith("backbone.")]
    assert [row.name for row in encoder if row.action == LEFT] == ["backbone.mask_token"]
    scales = [row for row in encoder if row.name.endswith(".gamma")]
    assert len(scales) == 8
    assert {(row.action, row.note, row.source) for row in scales} == {
        (ADAPTED, "ones: the source has no LayerScale", "")
    }


def test_positions_are_resized_without_the_class_token(tmp_path: Path) -> None:
    theirs = monai_vit()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "monai.pth")
    to = target(position_grid=(3, 3, 3))
    transfer(read_source(str(tmp_path / "monai.pth")), to)
    table = theirs.patch_embedding.position_embeddings
    found = to.network.state_dict()["backbone.pos_embed"]
    assert torch.equal(found[:, :1], torch.zeros(1, 1, 16))
    assert torch.allclose(found[:, 1:], resize_positions(table, (2, 2, 2), (3, 3, 3), 0), atol=1e-6)


def layer_scales(*left_out: str) -> dict[str, Tensor]:
    """Transfer an encoder without some of its tensors. Return the target's scales."""
    weights = {name: torch.randn(shape) for name, shape in encoder_layout(1, 16, 4, 0).items()}
    torch.save({n: t for n, t in weights.items() if not n.endswith(left_out)}, Path("vit.pth"))
    to = target()
    transfer(read_source("vit.pth"), to)
    return {name: tensor for name, tensor in to.network.state_dict().items() if name.endswith(".gamma")}


def test_only_blocks_that_were_copied_from_a_source_without_scales_get_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(bool((scale == 1).all()) for scale in layer_scales(".gamma").values())
    # one missing scale is no sign that the source has none
    some = layer_scales("blocks.1.ls1.gamma")
    assert bool((some["backbone.blocks.1.ls1.gamma"] == torch.tensor(1e-5)).all())
    # fresh attention starts with a small scale
    fresh = layer_scales(".gamma", "blocks.2.attn.qkv.weight")
    assert bool((fresh["backbone.blocks.2.ls1.gamma"] == torch.tensor(1e-5)).all())
    assert bool((fresh["backbone.blocks.3.ls1.gamma"] == 1).all())
