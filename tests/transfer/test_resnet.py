"""ResNet3D-18 into the residual encoder that has its widths."""

from pathlib import Path

import torch

from nnssl_ext.transfer.names import canonical_name
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import LEFT
from nnssl_ext.transfer.transfer import transfer
from tests.transfer.files import resnet18
from tests.transfer.helpers import planned, target


def test_57_of_60_tensors_of_a_resnet_18(tmp_path: Path) -> None:
    """All convolutions and norms but the 7x7x7 stem and its norm: 33.138 of 33.160 million parameters."""
    weights = resnet18()
    torch.save({"state_dict": {f"backbone.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "r.pth")
    same_widths = planned(
        "residual",
        stages=5,
        features_per_stage=[64, 64, 128, 256, 512],
        n_blocks_per_stage=[1, 2, 2, 2, 2],
        conv_bias=False,
    )
    to = target(same_widths)
    report = transfer(read_source(str(tmp_path / "r.pth")), to)
    assert "matched by their number" in str(report)

    trained = {name for name in weights if "running" not in name and "num_" not in name and "fc." not in name}
    rows = [row for row in report.rows if row.action != LEFT]
    assert (len(trained), len(rows)) == (60, 57)
    size = {name: weights[name].numel() for name in trained}
    assert round(sum(size.values()) / 1e6, 3) == 33.160
    assert round(report.filled / 1e6, 3) == 33.138
    left = {row.name: row.note for row in report.rows if row.name.startswith("encoder.stem.")}
    assert left["encoder.stem.convs.0.conv.weight"] == "no rule for a kernel edge 7 -> 3"
    # values, through a name that only the strided stage has
    state = {canonical_name(name): tensor for name, tensor in to.network.state_dict().items()}
    skip = state["encoder.stages.3.blocks.0.skip.1.conv.weight"]
    assert torch.equal(skip, weights["layer3.0.downsample.0.weight"])
    assert torch.equal(state["encoder.stages.4.blocks.1.conv2.norm.bias"], weights["layer4.1.bn2.bias"])
