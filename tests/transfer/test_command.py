"""nnssl_ext transfer, and what stock nnU-Net does with its file."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.networks.target import planned_network
from nnssl_ext.transfer.names import canonical_weights
from nnssl_ext.transfer.read import read_source
from tests.conftest import REPOSITORY, Environment
from tests.datasets import KINDS, make_plans
from tests.support.runs import pretrain
from tests.support.transfers import stock_network, transferred
from tests.transfer.files import as_numpy_1, nnssl_file, resnet18, spark_file, stock_file
from tests.transfer.helpers import planned

Data = Callable[[str], Environment]

#: Stock's training, only shorter, and a small Primus, built as stock's Primus trainers do.
TRAINERS = """
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerBrief(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 1

    def perform_actual_validation(self, save_probabilities=False):
        pass


class SmallPrimusTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration, channels, outputs, deep_supervision=True):
        return Primus(channels, 72, (4, 4, 4), outputs, 2, 6, configuration.patch_size, scale_attn_inner=True)
"""


@pytest.fixture
def trainers(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = environment.root / "trainers"
    folder.mkdir()
    (folder / "brief.py").write_text(TRAINERS)
    path = f"{REPOSITORY / 'trainers'}{os.pathsep}{folder}"
    monkeypatch.setenv("nnUNet_extTrainer", path)
    environment.variables["nnUNet_extTrainer"] = path


def write_sources(folder: Path) -> list[str]:
    """One file of each kind that is known, named by it."""
    stock_file(folder / "stock_plain.pth", make_plans("plain"), "plain")
    stock_file(folder / "stock_residual.pth", make_plans("residual"), "residual")
    stock_file(folder / "stock_anisotropic.pth", make_plans("anisotropic"), "anisotropic")
    stock_file(folder / "stock_two_channel.pth", make_plans("two_channel"), "plain", channels=2)
    nnssl_file(folder / "nnssl_residual.pth", "residual")
    nnssl_file(folder / "nnssl_plain.pth", "plain")
    torch.save({"state_dict": resnet18(width=8, stem=3)}, folder / "resnet.pth")
    spark_file(folder / "spark.pth")
    as_numpy_1(folder / "stock_residual.pth", folder / "numpy_1.pth")
    bare = read_source(str(folder / "stock_plain.pth")).weights
    torch.save({"state_dict": {f"module.net.{name}": tensor for name, tensor in bare.items()}}, folder / "wrapped.pth")
    return [path.stem for path in folder.glob("*.pth")]


def test_every_source_into_every_target(with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock's own loader takes every file; every tensor but the heads is then the file's, by all its names."""
    folder = tmp_path / "sources"
    folder.mkdir()
    names = write_sources(folder)
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    ours = pretrain(environment, "plain", "quick") / "checkpoint_final.pth"
    (folder / "ours.pth").write_bytes(ours.read_bytes())
    for kind in KINDS:
        with_data(kind)
        for name in [*names, "ours"]:
            capsys.readouterr()
            options = ["--overlap", "--allow-partial"] if name == "resnet" else []
            file = transferred(folder / f"{name}.pth", kind, *options)
            printed = capsys.readouterr().out
            assert f"-pretrained_weights {file}" in printed
            network = stock_network(kind)
            load_pretrained_weights(network, str(file))
            weights = read_source(str(file)).weights
            total = 0
            for tensor_name, tensor in canonical_weights(network.state_dict()).items():
                total += tensor.numel()
                if ".seg_layers." not in tensor_name:
                    assert torch.equal(tensor, weights[tensor_name]), (name, kind, tensor_name)
            assert f"total    {total:>13,} parameters" in printed


def deeper(plans: dict) -> None:
    """Two channels, thick slices, four stages instead of three."""
    configuration = plans["configurations"]["3d_fullres"]
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    configuration["architecture"] = planned("plain", stages=4, strides=strides, kernel_sizes=kernels)
    configuration.update(patch_size=[8, 16, 16], spacing=[4.0, 1.0, 1.0])


@pytest.mark.parametrize("lengths", ["keep", "initial"])
def test_the_command_names_a_recipe_with_its_commands(
    with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], lengths: str
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    fold = pretrain(environment, "plain", "quick")
    capsys.readouterr()
    place, file = ["-d", "811", "-c", "3d_fullres"], tmp_path / "init.pth"
    assert main(["transfer", str(fold), *place, "--lengths", lengths, "-o", str(file)]) == 0
    printed = capsys.readouterr().out.partition("or, for a few thousand steps:\n")[2]
    plan, *again, tune = map(shlex.split, printed.splitlines())
    assert plan[-2:] == ["finetune_adamw", "finetune.steps=6000"]
    assert [words[1] for words in again] == (["transfer"] if lengths == "keep" else [])
    for words in (plan, *again):
        assert main(words[1:]) == 0
    assert tune[-1] == str(tmp_path / "initial_lengths.pth" if again else file)
    assert Path(tune[-1]).is_file()


@pytest.mark.usefixtures("trainers")
def test_one_channel_isotropic_to_two_channels_thick_slices_and_another_depth(with_data: Data, tmp_path: Path) -> None:
    """Our pretraining, the command, and stock's training from its file; the totals are counted by hand."""
    environment = with_data("residual")
    with_data("plain")
    environment.write_plans("plain", "quick", {})
    fold = pretrain(environment, "plain", "quick")
    with_data("two_channel")
    environment.write_plans("two_channel", "deeper", {}, deeper)
    file = tmp_path / "init.pth"
    words = ["-d", "814", "-c", "3d_fullres", "-p", "deeper", "-tr", "nnUNetTrainerBrief", "-o", str(file)]
    printed = environment.run("nnssl_ext", "transfer", str(fold), *words).stdout

    # features 4/8/12/12; convolution + bias + norm, kernels of 27 and 9
    encoder_copied = (4 + 2 * 4) + (8 * 4 * 27 + 3 * 8) + (12 * 8 * 27 + 3 * 12)
    encoder_adapted = 4 * 2 * 9
    encoder_left = 12 * 12 * 27 + 3 * 12
    decoder_copied = (12 * 8 * 8 + 8) + (8 * 16 * 27 + 3 * 8) + 4 + 3 * 4
    decoder_adapted = 8 * 4 * 4 + 4 * 8 * 9
    decoder_left = (12 * 12 * 4 + 12) + (12 * 24 * 27 + 3 * 12)
    heads = 3 * (12 + 8 + 4) + 3 * 3
    copied, adapted = encoder_copied + decoder_copied, encoder_adapted + decoder_adapted
    left = encoder_left + decoder_left + heads
    found = {word: int(n.replace(",", "")) for word, n in re.findall(r"^(\w+) +([\d,]+) parameters", printed, re.M)}
    assert found == {"copied": copied, "adapted": adapted, "left": left, "total": copied + adapted + left}
    assert "3 (8x8x8) from none" in printed

    words = ["-p", "deeper", "-tr", "nnUNetTrainerBrief", "-device", "cpu", "-pretrained_weights", str(file)]
    finished = environment.run("nnUNetv2_train", "814", "3d_fullres", "0", *words)
    assert "Loading pretrained weights from file" in finished.stdout
    trained = environment.fold("two_channel", "deeper", "nnUNetTrainerBrief") / "checkpoint_final.pth"
    assert trained.is_file()
    # three steps away from what was handed over, not from somewhere else
    start, end = read_source(str(file)).weights, read_source(str(trained)).weights
    scratch = canonical_weights(stock_network("two_channel").state_dict())
    name = "encoder.stages.2.0.convs.0.conv.weight"
    assert 0 < (end[name] - start[name]).norm() < 0.5 * (scratch[name] - start[name]).norm()


@pytest.mark.usefixtures("trainers")
def test_primus(with_data: Data, tmp_path: Path) -> None:
    """From a file of nnssl into a trainer that builds Primus, through stock's loader."""
    with_data("two_channel")
    nnssl_file(tmp_path / "primus.pth", "primus")
    file = transferred(tmp_path / "primus.pth", "two_channel", "-tr", "SmallPrimusTrainer")
    network = stock_network("two_channel", trainer="SmallPrimusTrainer")
    load_pretrained_weights(network, str(file))
    given, state = read_source(str(tmp_path / "primus.pth")).weights, network.state_dict()
    assert torch.equal(state["eva.blocks.0.mlp.fc2.weight"], given["eva.blocks.0.mlp.fc2.weight"])
    assert torch.equal(state["down_projection.proj.weight"][:, 1], given["down_projection.proj.weight"][:, 0] / 2)
    assert state["eva.pos_embed"].shape[1] == 4**3 != given["eva.pos_embed"].shape[1]
    written = torch.load(file, weights_only=True)["nnssl_adaptation_plan"]
    assert (written["key_to_encoder"], written["key_to_lpe"]) == ("eva", "eva.pos_embed")


@pytest.mark.parametrize(("theirs", "ours"), [("3d_fullres", "3d_lowres"), ("3d_lowres", "3d_fullres")])
def test_low_and_full_resolution(with_data: Data, tmp_path: Path, theirs: str, ours: str) -> None:
    environment = with_data("plain")

    def coarser(plans: dict) -> None:
        for configuration in ("3d_fullres", "3d_lowres"):
            plans["configurations"][configuration]["architecture"] = planned(features_per_stage=[6, 6, 6])
        plans["configurations"]["3d_lowres"]["spacing"] = [2.0, 2.0, 2.0]

    environment.write_plans("plain", "both", {}, coarser)
    fold = pretrain(environment, "plain", "both", configuration=theirs)
    file = tmp_path / "init.pth"
    main(["transfer", str(fold), "-d", "811", "-c", ours, "-p", "both", "-o", str(file), "--align", "resolution"])
    given, written = read_source(str(fold)).weights, read_source(str(file)).weights
    layer = "encoder.stages.{}.0.convs.0.conv.weight"
    stage = (2, 1) if ours == "3d_lowres" else (1, 2)
    assert torch.equal(written[layer.format(stage[1])], given[layer.format(stage[0])])


def test_what_is_written_is_a_source_again_and_small(with_data: Data, tmp_path: Path) -> None:
    with_data("plain")
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    first = transferred(tmp_path / "stock.pth", "plain")
    parameters = sum(tensor.numel() for tensor in read_source(str(first)).weights.values())
    assert first.stat().st_size < 4 * parameters + 150_000  # each tensor once, whatever its names
    content: Any = torch.load(first, weights_only=True)
    note = content["nnssl_ext"]["transfer"]
    assert note["source"]["file"] == "stock.pth"
    assert note["filled"] == sum(row["filled"] for row in note["rows"])
    assert content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["3d_fullres"]["spacing"] == [1, 1, 1]
    second = transferred(first, "plain")
    # heads were not filled by the first transfer, and nothing pretends that they were
    assert read_source(str(second)).untrained == read_source(str(first)).untrained != frozenset()


def test_the_same_call_gives_the_same_weights(with_data: Data, tmp_path: Path) -> None:
    with_data("residual")
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    files = [
        transferred(tmp_path / "stock.pth", "residual", *o) for o in ((), ("--seed", "0"), ("--seed", "1", "--overlap"))
    ]
    digests = [torch.load(file, weights_only=True)["nnssl_ext"]["weights_sha256"] for file in files]
    assert digests[0] == digests[1] != digests[2]


def test_refused_command_lines_write_nothing(with_data: Data, tmp_path: Path) -> None:
    with_data("plain")
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    torch.save({"state_dict": resnet18(width=5)}, tmp_path / "resnet.pth")
    (tmp_path / "there.pth").write_text("mine")
    good = {"source": "stock.pth", "-d": "811", "-c": "3d_fullres", "-p": "nnUNetPlans", "-o": "init.pth"}
    wrong = [
        ({"source": "absent.pth"}, "no file, no folder and no Hugging Face repository"),
        ({"-d": "999"}, "expected one data set Dataset999_*"),
        ({"-c": "3d_none"}, "have no configuration '3d_none'. They have 2d, 3d_fullres"),
        ({"-c": "3d_cascade_fullres"}, "is a cascade stage"),
        ({"-p": "absent"}, "cannot read"),
        ({"-tr": "nnUNetTrainerAbsent"}, "-tr: trainer 'nnUNetTrainerAbsent' was not found by nnU-Net"),
        (
            {"-tr": "nnUNet_Primus_S_Trainer", "-c": "2d"},
            "nnUNet_Primus_S_Trainer cannot build the network of plans nnUNetPlans",
        ),
        ({"-o": "there.pth"}, "there.pth exists"),
        ({"-o": "nowhere/init.pth"}, "is no folder. Make it first"),
        ({"source": "resnet.pth"}, "nothing of resnet.pth (ResNet3D) fits the target network"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for change, message in wrong:
        words = {**good, **change}
        command = ["transfer", str(tmp_path / words.pop("source"))]
        words["-o"] = str(tmp_path / words["-o"])
        with pytest.raises(UserError) as error:
            main([*command, *(word for pair in words.items() for word in pair)])
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_a_data_set_without_labels_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="nnU-Net cannot read channels and labels of dataset.json: KeyError"):
        planned_network(PlansManager(make_plans("plain")), "3d_fullres", {"channel_names": {"0": "MR"}})
