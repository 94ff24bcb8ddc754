"""Outputs of equal labels keep their rows; others start fresh."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.transfer.heads import matching_rows, output_names
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import ADAPTED, LEFT
from nnssl_ext.transfer.source import PretrainedWeights
from nnssl_ext.transfer.start import fill_networks, load_heads, pretrained_weights_argument
from nnssl_ext.transfer.transfer import TargetNetwork, transfer
from tests.conftest import Environment
from tests.datasets import make_plans
from tests.transfer.files import nnssl_file, stock_file
from tests.transfer.helpers import MILLIMETRE, built, planned, source

Data = Callable[[str], Environment]
LABELS: dict[str, dict[str, Any]] = {
    "softmax": {"labels": {"background": 0, "liver": 1, "tumor": 2}},
    "not sorted": {"labels": {"tumor": 2, "background": 0, "liver": 1, "ignore": 3}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        "regions_class_order": [1, 2, 3],
    },
}


@pytest.mark.parametrize("name", LABELS)
def test_outputs_are_those_of_nnu_nets_label_manager(name: str) -> None:
    dataset = LABELS[name]
    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    names, regions = output_names(dataset)
    assert regions == manager.has_regions
    assert len(names) == manager.num_segmentation_heads
    values = manager.foreground_regions if regions else manager.all_labels
    expected = [dataset["labels"][label] for label in names]
    assert [tuple(v) if isinstance(v, list) else v for v in expected] == list(values or [])


def test_rows_of_equal_names_are_paired() -> None:
    assert matching_rows(("background", "tumor", "cyst"), ("background", "liver", "tumor")) == ((0, 0), (1, 2))
    assert matching_rows(("a",), ("b",)) == ()


def labelled(given: PretrainedWeights, *names: str, regions: bool = False) -> PretrainedWeights:
    return replace(given, outputs=names, regions=regions)


def to_network(*names: str, regions: bool = False, stages: int = 3) -> TargetNetwork:
    torch.manual_seed(0)
    network = built(planned(stages=stages), outputs=len(names))
    return TargetNetwork(network, MILLIMETRE, (16, 16, 16), outputs=names, regions=regions)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("stages", [3, 4])
def test_equal_labels_keep_their_rows_and_new_ones_start_fresh(regions: bool, stages: int) -> None:
    given = labelled(source(planned(), outputs=3), "background", "liver", "tumor", regions=regions)
    to = to_network("background", "tumor", "cyst", "vessel", regions=regions, stages=stages)
    before = {name: tensor.detach().clone() for name, tensor in to.tensors.items()}
    report = transfer(given, to)
    rows = {row.name: row for row in report.rows if ".seg_layers." in row.name}
    finest = f"decoder.seg_layers.{stages - 2}.weight"
    assert rows[finest].action == ADAPTED
    assert rows[finest].note == "outputs of equal labels: background, tumor"
    head, theirs = to.tensors[finest], given.weights["decoder.seg_layers.1.weight"]
    assert torch.equal(head[:2], theirs[[0, 2]])
    assert torch.equal(head[2:], before[finest][2:])
    assert rows[finest].filled == 2 * head[0].numel()
    bias = finest.replace("weight", "bias")
    assert torch.equal(to.tensors[bias][:2], given.weights["decoder.seg_layers.1.bias"][[0, 2]])


@pytest.mark.parametrize(
    ("theirs", "regions"), [(("background", "liver", "tumor"), True), (("a", "b", "c"), False), ((), False)]
)
def test_other_labels_or_other_kinds_of_outputs_leave_the_heads(theirs: tuple[str, ...], regions: bool) -> None:
    given = labelled(source(planned(), outputs=3), *theirs, regions=regions)
    report = transfer(given, to_network("background", "liver", "tumor"))
    assert {row.action for row in report.rows if ".seg_layers." in row.name} == {LEFT}
    assert "heads stay at their initial values" in str(report)


def test_only_our_fine_tuner_takes_heads(with_data: Data, tmp_path: Path) -> None:
    """Through the command: stock's trainer leaves them, the file of our trainer holds and loads them."""
    environment = with_data("labelled")
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    content = torch.load(tmp_path / "stock.pth", weights_only=False)
    names = list(json.loads((environment.dataset("labelled") / "dataset.json").read_text())["labels"])
    content["init_args"]["dataset_json"] = {"labels": {"background": 0, names[-1]: 1, "other": 2}}
    torch.save(content, tmp_path / "stock.pth")
    theirs = read_source(str(tmp_path / "stock.pth")).weights["decoder.seg_layers.1.weight"]
    for trainer in ("nnUNetTrainer", "nnsslTrainer_Probe", "nnsslTrainer_Finetune"):
        file = tmp_path / f"{trainer}.pth"
        words = ["-d", "817", "-c", "3d_fullres", "-tr", trainer, "-o", str(file)]
        assert main(["transfer", str(tmp_path / "stock.pth"), *words]) == 0
        if trainer == "nnsslTrainer_Probe":  # its heads read the encoder
            rows = checkpoint.load(file)["nnssl_ext"]["transfer"]["rows"]
            assert {row["action"] for row in rows if ".seg_layers." in row["name"]} == {LEFT}
            continue
        written = read_source(str(file)).weights["decoder.seg_layers.1.weight"]
        network = built(planned(), outputs=len(names))
        labels = json.loads((environment.dataset("labelled") / "dataset.json").read_text())
        loaded = load_heads(network, file, labels)
        if trainer == "nnUNetTrainer":
            assert loaded == []
            continue
        assert torch.equal(written[len(names) - 1], theirs[1])
        assert torch.equal(network.state_dict()["decoder.seg_layers.1.weight"], written)
        assert "decoder.seg_layers.1.weight" in loaded
        # another data set's labels, as many or more
        other = {f"other {n}": n for n in range(1, len(names))}
        for wrong in ({"background": 0, **other}, {"background": 0, **other, "more": len(names)}):
            assert load_heads(network, file, {"labels": wrong}) == []


def test_files_of_others_have_no_heads_to_load(tmp_path: Path) -> None:
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    assert load_heads(built(planned()), tmp_path / "stock.pth", {"labels": {"background": 0, "organ": 1}}) == []


def test_the_argument_of_stocks_command_is_found() -> None:
    words = ["nnUNetv2_train", "4", "3d_fullres", "0"]
    assert pretrained_weights_argument([*words, "-pretrained_weights", "a b.pth"]) == Path("a b.pth")
    assert pretrained_weights_argument([*words, "-pretrained_weights=a.pth", "-tr", "x"]) == Path("a.pth")
    assert pretrained_weights_argument(words) is None


def test_networks_are_filled_as_by_the_command(tmp_path: Path) -> None:
    weights = nnssl_file(tmp_path / "nnssl.pth", "residual")
    student, teacher = (built(planned("residual")) for _ in range(2))
    report = fill_networks([student, teacher, student], str(tmp_path / "nnssl.pth"), MILLIMETRE, (16, 16, 16))
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    for network in (student, teacher):
        assert torch.equal(network.state_dict()[name], weights[name])
    assert report.encoder_share == 1.0
    assert str(report).count("Starting from") == 1


def test_the_background_alone_is_no_match() -> None:
    """It held what the target tells apart."""
    assert matching_rows(("background", "spleen"), ("background", "liver", "tumour")) == ()
    assert matching_rows(("background", "spleen"), ("background", "liver", "spleen")) == ((0, 0), (1, 2))
