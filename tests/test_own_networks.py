"""The line with networks of ours: named by plans, pretrained, handed over, trained and used by stock nnU-Net."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.methods import TRAINERS
from nnssl_ext.networks.backbone import backbone_of
from tests.conftest import Environment
from tests.datasets import OWN_NETWORKS
from tests.support.runs import CPU, Killed, kill_at, pretrain, trainer_for, write_raw

Data = Callable[[str], Environment]

#: Overrides that make a recipe's network trainable in a test.
TINY = {
    "vit_small": 'architecture.arch_kwargs={"embed_dim":12,"depth":4,"num_heads":2,"decoder_features":4}',
    "pct_net": 'architecture.arch_kwargs={"features_per_stage":[4,4,8,8,16],"heads":[2,2,4]}',
}


def weights_after(environment: Environment, kind: str, trainer: str, name: str, settings: dict) -> dict[str, Tensor]:
    environment.write_plans(kind, name, settings)
    return checkpoint.load(pretrain(environment, kind, name, trainer=trainer) / "checkpoint_final.pth")[
        "network_weights"
    ]


@pytest.mark.parametrize("kind", OWN_NETWORKS)
@pytest.mark.parametrize("method", ["volume_fusion", "masked_autoencoder", "rotation", "exemplar", "dino"])
def test_hand_over(with_data: Data, method: str, kind: str) -> None:
    """Every tensor but the heads reaches the stock trainer, and it is what was learned."""
    environment, trainer = with_data(kind), TRAINERS[method]
    weights = weights_after(environment, kind, trainer, "quick", {})
    still = weights_after(environment, kind, trainer, "still", {"learning_rate": 0.0, "epochs": 1})

    stock = trainer_for(kind, "quick", "nnUNetTrainer")
    file = environment.fold(kind, "quick", trainer) / "checkpoint_final.pth"
    summary = json.loads((file.parent / "pretraining_summary.json").read_text())
    plan, *transfer, tune = summary["recipe_commands"]
    recipe = "finetune_transformer" if kind == "vit" else "finetune_adamw"
    assert f"-p quick -o quick_{recipe} {recipe}" in plan
    assert f"-p quick_{recipe} -tr nnsslTrainer_Finetune" in tune
    assert bool(transfer) == (kind != "vit" and not summary["weight_lengths"]["restored"])
    maybe_load_checkpoint(stock, False, False, str(file))
    loaded = stock.network.state_dict()
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded if ".seg_layers." not in name)
    assert loaded[[name for name in loaded if ".seg_layers." in name][-1]].shape == (3,)

    volume = torch.randn(1, 1, *stock.configuration_manager.patch_size, generator=torch.Generator().manual_seed(0))
    stock.network.eval()
    with torch.no_grad():
        learned = backbone_of(stock.network).features(volume)
        stock.network.load_state_dict({k: loaded[k] if ".seg_layers." in k else v for k, v in still.items()})
        unlearned = backbone_of(stock.network).features(volume)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(learned, unlearned, strict=True))
    # running statistics of the decoder's norms follow the lengths of the encoder's convolutions
    parameters = {name for name, _ in stock.network.named_parameters()}
    decoders = [
        name for name in parameters if name.startswith(("decoder.", "pred_heads.")) and ".seg_layers." not in name
    ]
    changed = [name for name in decoders if not torch.equal(weights[name], still[name])]
    assert bool(changed) == (method in ("volume_fusion", "masked_autoencoder"))


@pytest.mark.parametrize("method", ["jigsaw", "relative_patch_location", "contrastive_predictive_coding"])
def test_puzzles_on_tokens(with_data: Data, method: str) -> None:
    environment, trainer = with_data("vit"), TRAINERS[method]
    assert weights_after(environment, "vit", trainer, "quick", {"epochs": 1})


def test_what_needs_strides_is_refused_before_anything_is_written(with_data: Data) -> None:
    environment, trainer = with_data("vit"), TRAINERS["variable_dimension_transform"]
    environment.write_plans("vit", "quick", {})
    with pytest.raises(SystemExit, match="Variable dimension transform cannot pretrain .*Use a U-Net"):
        pretrain(environment, "vit", "quick", trainer=trainer)
    assert not list(environment.results.rglob("*"))
    environment = with_data("pct_net")
    assert weights_after(environment, "pct_net", trainer, "quick", {"epochs": 1})


@pytest.mark.parametrize("kind", OWN_NETWORKS)
def test_continued_equals_never_killed(with_data: Data, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Drop-path and dropout draw the same again."""
    environment, trainer = with_data(kind), TRAINERS["volume_fusion"]
    whole = weights_after(environment, kind, trainer, "whole", {})
    environment.write_plans(kind, "broken", {})
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            pretrain(environment, kind, "broken", trainer=trainer)
    torch.manual_seed(12345)  # a new process starts with another state
    folder = pretrain(environment, kind, "broken", trainer=trainer, c=True)
    broken = checkpoint.load(folder / "checkpoint_final.pth")["network_weights"]
    assert checkpoint.digest(broken) == checkpoint.digest(whole)


def stock_training(plans: str, weights: str | None) -> None:
    """What ``nnUNetv2_train -tr nnUNetTrainer_1epoch`` does, with fewer iterations."""
    trainer = get_trainer_from_args("4", "3d_fullres", 0, "nnUNetTrainer_1epoch", plans, device=CPU)
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 3, 1
    if weights:
        maybe_load_checkpoint(trainer, False, False, weights)
    trainer.run_training()
    trainer.perform_actual_validation(False)


@pytest.mark.slow
def test_from_a_recipe_to_a_prediction(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw images, stock planning, a recipe, pretraining, stock training and validation, nnUNetv2_predict."""
    write_raw(environment, "Dataset004_Tiny")
    environment.run(
        *("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "1"),
        variables={"nnUNet_n_proc_DA": "1"},
    )
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    images, folder = environment.root / "raw" / "Dataset004_Tiny" / "imagesTs", "Dataset004_Tiny"
    short = ["epochs=1", "iterations_per_epoch=2", "validation_iterations=1", "configuration.batch_size=2"]
    for recipe, tiny in TINY.items():
        environment.run("nnssl_ext", "plan", "-d", "4", "-o", recipe, recipe, tiny, *short)
        plans = json.loads((environment.preprocessed / folder / f"{recipe}.json").read_text())
        assert plans["configurations"]["3d_fullres"]["patch_size"] == [32, 32, 32]

        trainer = get_trainer_from_args("4", "3d_fullres", 0, "nnsslTrainer_VolumeFusion", recipe, device=CPU)
        trainer.run_training()
        stock_training(recipe, f"{trainer.output_folder}/checkpoint_final.pth")
        output = environment.root / recipe
        environment.run(
            *("nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", "4", "-c", "3d_fullres"),
            *("-tr", "nnUNetTrainer_1epoch", "-p", recipe, "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"),
            variables={"nnUNet_extTrainer": ""},
        )
        prediction = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(output / "c6.nii.gz")))
        assert prediction.shape == (24, 28, 26)
        assert set(np.unique(prediction)) <= {0, 1}
        results = environment.results / folder / f"nnUNetTrainer_1epoch__{recipe}__3d_fullres" / "fold_0"
        assert (results / "validation" / "summary.json").is_file()
