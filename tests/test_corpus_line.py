"""Images without labels -> nnssl_ext corpus -> stock nnUNetv2_train -> the target's network, by stock's own loader."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.training.preflight import target_network
from tests.conftest import Environment
from tests.volumes import volume, write_image, write_series

PLANS = "nnUNetPlans_quick"
TRAINER = "nnsslTrainer_VolumeFusion"


def test_a_corpus_pretrains_its_target(with_data: Callable[[str], Environment], tmp_path: Path) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", PLANS, {"epochs": 1})
    for number in range(3):
        write_image(tmp_path / "files" / f"{number}.nii.gz", volume(number, (18, 20, 22)))
    write_series(tmp_path / "dicom", volume(5, (10, 20, 22)))
    corpus = [sys.executable, "-m", "nnssl_ext", "corpus", "-d", "851", "-n", "Open", "--like", "811", "-p", PLANS]
    said = environment.run(*corpus, str(tmp_path / "files"), str(tmp_path / "dicom"), "-np", "2").stdout
    command = said.rpartition("pretrain with: ")[2].split()
    assert command == ["nnUNetv2_train", "851", "3d_fullres", "all", "-p", PLANS, "-tr", TRAINER]

    environment.run(*command, "-device", "cpu")
    fold = environment.results / "Dataset851_Open" / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_all"
    summary = json.loads((fold / "pretraining_summary.json").read_text())
    assert summary["training_cases"] == 4
    # the weights are for the target, and the summary says so
    assert summary["next_command"].startswith(f"nnUNetv2_train 811 3d_fullres 0 -p {PLANS} -pretrained_weights")

    plans = PlansManager(environment.plans("plain", PLANS))
    network = target_network(plans, plans.get_configuration("3d_fullres"), 1, 3)
    load_pretrained_weights(network, str(fold / "checkpoint_final.pth"))
    weights = torch.load(fold / "checkpoint_final.pth", weights_only=True)["network_weights"]
    loaded = network.state_dict()
    assert weights.keys() == loaded.keys()
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        k: tuple(v.shape) for k, v in loaded.items()
    }
    assert all(torch.equal(weights[name], loaded[name]) for name in loaded if ".seg_layers." not in name)
