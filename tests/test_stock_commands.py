"""The line as a user walks it: real nnUNetv2_* commands, from pretraining to prediction."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import SimpleITK
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.networks.backbone import backbone_of
from tests.conftest import Environment
from tests.datasets import KINDS, dataset_name
from tests.documents import shown_lines
from tests.support.runs import pretrain, trainer_for, write_raw
from tests.trainers import SHORT, short_trainer

Data = Callable[[str], Environment]


def features(weights: dict[str, Tensor], kind: str) -> list[Tensor]:
    """The encoder's features of a fixed volume, with a file's weights in the network that stock builds."""
    trainer = trainer_for(kind, "quick", "nnUNetTrainer")
    trainer.initialize()
    own = trainer.network.state_dict()
    trainer.network.load_state_dict({k: own[k] if ".seg_layers." in k else v for k, v in weights.items()})
    channels, size = trainer.num_input_channels, trainer.configuration_manager.patch_size
    volume = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone_of(trainer.network).features(volume)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_hand_over(with_data: Data, method: str, kind: str) -> None:
    """Every tensor but the heads reaches the stock trainer, under every alias, and it is what was learned."""
    environment, trainer = with_data(kind), TRAINERS[method]
    environment.write_plans(kind, "quick", {})
    if list(METHODS).index(method) % len(KINDS) == KINDS.index(kind):  # one real command for each method
        words = ["3d_fullres", "0", "-tr", trainer, "-p", "quick", "-device", "cpu"]
        assert "Pretraining summary" in environment.run("nnUNetv2_train", dataset_name(kind), *words).stdout
    else:
        pretrain(environment, kind, "quick", trainer=trainer)
    file = environment.fold(kind, "quick", trainer) / "checkpoint_final.pth"
    weights = checkpoint.load(file)["network_weights"]

    stock = trainer_for(kind, "quick", "nnUNetTrainer")
    maybe_load_checkpoint(stock, False, False, str(file))
    loaded = stock.network.state_dict()
    assert set(loaded) == set(weights)
    for name, value in loaded.items():
        if ".seg_layers." not in name:
            assert torch.equal(value, weights[name]), name

    environment.write_plans(kind, "still", {"learning_rate": 0.0, "epochs": 1, "iterations_per_epoch": 1})
    still = checkpoint.load(pretrain(environment, kind, "still", trainer=trainer) / "checkpoint_final.pth")[
        "network_weights"
    ]
    volume = torch.randn(
        1,
        stock.num_input_channels,
        *stock.configuration_manager.patch_size,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        handed_over = backbone_of(stock.network).features(volume)
    for here, file_says, unlearned in zip(handed_over, features(weights, kind), features(still, kind), strict=True):
        assert torch.equal(here, file_says)
        assert not torch.allclose(here, unlearned, atol=1e-4)


def test_bad_input_through_the_command(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epoch": 1})
    finished = environment.run(
        "nnUNetv2_train",
        "811",
        "3d_fullres",
        "0",
        "-tr",
        "nnsslTrainer_VolumeFusion",
        "-p",
        "run",
        "-device",
        "cpu",
        status=1,
        variables={"PYTHONWARNINGS": "ignore"},
    )
    assert finished.stderr.splitlines() == [
        "nnssl_ext: error: plans run: unknown setting 'epoch'; did you mean 'epochs'?"
    ]


readme_block = partial(shown_lines, "README.md")
guide_block = partial(shown_lines, "docs/get-started.md")


def test_the_readmes_phantom(environment: Environment) -> None:
    (line,) = guide_block("phantom")
    environment.run("bash", "-ec", line.replace("--cases 60 --labeled 6", "--cases 4 --labeled 1"))
    assert (environment.root / "raw" / "Dataset900_Phantom" / "splits_final.json").is_file()


@pytest.mark.slow
def test_the_readme_from_raw_images_to_a_prediction(environment: Environment) -> None:
    """The README's own lines on a raw data set; only the plans are made small and the trainings short."""
    write_raw(environment, "Dataset004_Tiny")
    plan_and_preprocess, pretraining, weights, finetuning = readme_block("four lines")
    # stock planning sets torch's threads to nnUNet_n_proc_DA and fails at 0
    environment.run("bash", "-ec", f"{plan_and_preprocess} -np 1", variables={"nnUNet_n_proc_DA": "1"})
    folder = environment.preprocessed / "Dataset004_Tiny"
    (guide_plan,) = guide_block("plan")
    environment.run("bash", "-ec", guide_plan)
    assert json.loads((folder / "nnUNetPlans_vf.json").read_text())["nnssl_ext"]["epochs"] == 200

    for line in readme_block("doctor"):
        examined = environment.run("bash", "-ec", line, variables={"nnUNet_n_proc_DA": "1"})
        assert "all is well" in examined.stdout

    small = "architecture.features_base=4 architecture.features_max=8 configuration.batch_size=2"
    short = "epochs=1 iterations_per_epoch=2 validation_iterations=1"
    environment.run("bash", "-ec", f"nnssl_ext plan -d 4 -o small {small} {short}")
    # the README trains with the data set's own plans: put the small ones in their place
    plans = {**json.loads((folder / "small.json").read_text()), "plans_name": "nnUNetPlans"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    environment.run("bash", "-ec", f'export nnUNet_extTrainer="$(nnssl_ext trainers)"\n{pretraining} -device cpu')
    finished = environment.run(
        "bash",
        "-ec",
        f"{weights}\n{finetuning} -tr {SHORT} -device cpu",
        variables={"nnUNet_def_n_proc": "1", "nnUNet_extTrainer": short_trainer(environment.root)},
    )
    assert "Loading pretrained weights from file" in finished.stdout
    assert "Mean Validation Dice" in finished.stdout

    # the fine-tuned model needs nothing of ours to predict
    images = environment.root / "raw" / "Dataset004_Tiny" / "imagesTs"
    environment.run(
        "nnUNetv2_predict",
        "-i",
        str(images),
        "-o",
        str(environment.root / "out"),
        "-d",
        "4",
        "-c",
        "3d_fullres",
        "-tr",
        SHORT,
        "-f",
        "0",
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
        variables={"nnUNet_extTrainer": short_trainer(environment.root)},
    )
    prediction = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(environment.root / "out" / "c6.nii.gz")))
    assert prediction.shape == (24, 28, 26)

    # pseudo-labels, from this prediction
    page = partial(shown_lines, "docs/how-to/pseudo-labels.md")
    folders = [f"UNLABELED={images}", f"PSEUDO={environment.root / 'out'}"]
    preprocessing = [f"{line} -np 1" if "preprocess" in line else line for line in page("preprocess")]
    *split, training = page("split")
    training += f" -tr {SHORT} -device cpu"
    lines = [weights, *folders, *page("both"), *preprocessing, *split, training]
    finished = environment.run(
        "bash",
        "-ec",
        "\n".join(lines),
        variables={"nnUNet_n_proc_DA": "1", "nnUNet_extTrainer": short_trainer(environment.root)},
    )
    assert "Mean Validation Dice" in finished.stdout
    (fold,) = json.loads((environment.preprocessed / "Dataset005_Pseudo" / "splits_final.json").read_text())
    assert "c6" in fold["train"]
    assert "c6" not in fold["val"]
