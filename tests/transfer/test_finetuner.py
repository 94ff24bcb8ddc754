"""The fine-tuner of this package starts from a transferred file, and its checkpoints are sources."""

from collections.abc import Callable
from pathlib import Path

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
