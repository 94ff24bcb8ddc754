"""Primus, which has one output and no decoder of stages, is fine-tuned as the pretraining's summary says."""

import json
from collections.abc import Callable

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl_ext import checkpoint
from nnssl_ext.recipe import load_recipe
from tests.conftest import Environment
from tests.support.finetunings import NAME, RUN, final, tune
from tests.support.runs import STOCK, pretrain


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("snapshots", [[2], []])
def test_a_pretrained_primus_is_fine_tuned_validated_and_predicts(
    with_data: Callable[[str], Environment], snapshots: list[int]
) -> None:
    environment = with_data("labelled")
    recipe = load_recipe("finetune_transformer").settings["finetune"]
    finetune = {**RUN, **recipe, "steps": 3, "snapshots": snapshots}
    environment.write_plans("labelled", "primus", {"epochs": 1, "target_trainer": STOCK, "finetune": finetune})
    folder = pretrain(environment, "labelled", "primus", trainer="nnsslTrainer_MaskedAutoencoder")
    commands = json.loads((folder / "pretraining_summary.json").read_text())["recipe_commands"]
    assert commands[0].endswith(" finetune_transformer")
    assert f"-tr {NAME} " in commands[1]
    given = checkpoint.load(folder / "checkpoint_final.pth")["network_weights"]

    tuned = tune(environment, "labelled", "primus", folder / "checkpoint_final.pth")

    content = final(tuned)
    assert content["trainer_name"] == STOCK
    assert content["nnssl_ext"]["step"] == 3
    name = "eva.blocks.0.mlp.fc1_g.weight"
    assert 0 < (content["network_weights"][name] - given[name]).abs().mean() < 0.1 * given[name].abs().mean()
    for part in ["validation", *(f"validation_step_{step:06d}" for step in snapshots)]:
        assert json.loads((tuned / part / "summary.json").read_text())["metric_per_case"]
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(tuned.parent), (0,), "checkpoint_final.pth")
