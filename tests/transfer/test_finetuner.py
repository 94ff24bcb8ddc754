"""The fine-tuner of this package starts from a transferred file, and its checkpoints are sources."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnssl_ext.transfer.read import read_source
from tests.conftest import Environment
from tests.datasets import make_plans
from tests.support.finetunings import NAME, RUN, tune
from tests.support.transfers import transferred
from tests.transfer.files import stock_file


def test_from_supervised_weights_through_the_fine_tuner(
    with_data: Callable[[str], Environment], tmp_path: Path
) -> None:
    environment = with_data("labelled")
    stock_file(tmp_path / "stock.pth", make_plans("anisotropic"), "anisotropic")
    file = transferred(tmp_path / "stock.pth", "labelled", "-tr", NAME)
    # a rate of zero: what comes out is what was handed over
    still = {**RUN, "snapshots": [], "learning_rate": 0.0, "weight_decay": 0.0}
    environment.write_plans("labelled", "still", {"finetune": still})
    fold = tune(environment, "labelled", "still", pretrained=file)
    given, tuned = read_source(str(file)), read_source(str(fold))
    for known in ("spacing", "strides", "patch_size", "normalization"):
        assert getattr(tuned.geometry, known) == getattr(given.geometry, known)
    assert tuned.kind == "nnssl_ext, nnUNetTrainer"
    for name, tensor in tuned.weights.items():
        if "seg_layers" not in name:
            assert torch.equal(tensor, given.weights[name]), name


def test_heads_of_equal_labels_come_through_the_fine_tuner(
    with_data: Callable[[str], Environment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nnUNetv2_train starts it: stock loads all but the heads, the fine-tuner the heads."""
    environment = with_data("labelled")
    stock_file(tmp_path / "stock.pth", make_plans("anisotropic"), "anisotropic")
    labels = json.loads((environment.dataset("labelled") / "dataset.json").read_text())["labels"]
    content = torch.load(tmp_path / "stock.pth", weights_only=False)
    content["init_args"]["dataset_json"] = {"labels": {"background": 0, list(labels)[-1]: 1, "other": 2}}
    torch.save(content, tmp_path / "stock.pth")
    file = transferred(tmp_path / "stock.pth", "labelled", "-tr", NAME)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "817", "3d_fullres", "0", "-pretrained_weights", str(file)])
    still = {**RUN, "snapshots": [], "learning_rate": 0.0, "weight_decay": 0.0}
    environment.write_plans("labelled", "heads", {"finetune": still})
    fold = tune(environment, "labelled", "heads", pretrained=file)
    name = "decoder.seg_layers.1.weight"
    theirs, tuned = (read_source(str(source)).weights[name] for source in (tmp_path / "stock.pth", fold))
    assert torch.equal(tuned[0], theirs[0])
    assert torch.equal(tuned[len(labels) - 1], theirs[1])
    assert torch.equal(tuned, read_source(str(file)).weights[name])
