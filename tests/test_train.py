import ast
import json
import os
import shlex
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.cli import main
from nnssl_ext.environment import check_shared_memory, check_split
from nnssl_ext.errors import UserError
from nnssl_ext.networks.target import check_stock_weights, target_network
from nnssl_ext.train import _check
from tests.conftest import REPOSITORY, Environment
from tests.support.runs import STOCK

Data = Callable[[str], Environment]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["999", "3d_fullres", "0"], r"expected one data set Dataset999_\* in"),
        (["811", "3d_fullres", "0", "-p", "nnUNetPlan"], "has no plans 'nnUNetPlan'. It has nnUNetPlans"),
        (["811", "3d_fulres", "0"], "plans nnUNetPlans have no configuration '3d_fulres'. They have 2d, 3d_fullres"),
        (["811", "3d_fullres", "first"], "fold must be 'all' or a number, got 'first'"),
        (
            ["811", "3d_fullres", "0", "-pretrained_weights", "absent.pth"],
            "absent.pth does not exist",
        ),
        (["811", "3d_fullres", "0", "-device", "cpu", "-num_gpus", "2"], "-num_gpus 2 needs -device cuda, got cpu"),
        (["811", "3d_fullres", "0", "-device", "cpu", "-num_gpus", "0"], "-num_gpus must be at least 1, got 0"),
        (["811", "3d_fullres", "0", "-device", "cpu", "--val"], r"--val needs .*checkpoint_final.pth, which does not"),
        (["Task04_Hippocampus", "3d_fullres", "0"], "'Task04_Hippocampus' is a name of nnU-Net v1 or of the Decathlon"),
        (
            ["811", "3d_fullres", "0", "-tr", "nnsslTrainer_VolumeFuison"],
            r"trainer 'nnsslTrainer_VolumeFuison' was not found by nnU-Net. Did you mean 'nnsslTrainer_VolumeFusion'\?",
        ),
        (["811", "3d_fullres", "0", "-tr", "nnUNetTrainr"], r"Did you mean 'nnUNetTrainer'\?"),
        (["811", "3d_fullres", "0", "--max-time", "2"], "--max-time: nnUNetTrainer does not stop by itself"),
        (
            ["811", "3d_cascade_fullres", "0", "-device", "cpu", "-tr", "nnsslTrainer_Finetune"],
            "3d_cascade_fullres lacks [0-9]+ cases .*, but '3d_cascade_fullres' needs the predictions of 3d_lowres. "
            "Train it first, all folds: nnssl_ext train 811 3d_lowres FOLD -tr nnsslTrainer_Finetune",
        ),
    ],
)
def test_one_line_instead_of_a_traceback(with_data: Data, words: list[str], message: str) -> None:
    environment = with_data("plain")
    with pytest.raises(UserError, match=message) as error:
        main(["train", *words])
    assert "\n" not in str(error.value)
    assert not list(environment.results.iterdir())


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_missing_variables(with_data: Data, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with_data("plain")
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=f"{variable} is not set. Export it"):
        main(["train", "811", "3d_fullres", "0"])


def test_takes_nnunets_arguments_and_finds_our_trainers_by_itself(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 1})
    finished = environment.run(
        "nnssl_ext",
        "train",
        "811",
        "3d_fullres",
        "all",
        "-tr",
        "nnsslTrainer_VolumeFusion",
        "-p",
        "quick",
        "-device",
        "cpu",
        variables={"nnUNet_extTrainer": ""},
    )
    assert "Pretraining summary" in finished.stdout
    fold = environment.fold("plain", "quick", "nnsslTrainer_VolumeFusion", fold="all")
    assert (fold / "checkpoint_final.pth").is_file()


def test_help_is_nnunets(environment: Environment) -> None:
    ours = environment.run("nnssl_ext", "train", "x", "--help").stdout
    theirs = environment.run("nnUNetv2_train", "--help").stdout
    assert ours.split("positional arguments")[1] == theirs.split("positional arguments")[1]


CPU = ["811", "3d_fullres", "0", "-device", "cpu"]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_a_device_that_is_not_there(with_data: Data) -> None:
    with_data("plain")
    with pytest.raises(UserError, match="no MPS device was found"):
        main(["train", *CPU[:-1], "mps"])


@pytest.mark.parametrize("variable", ["nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
@pytest.mark.parametrize("value", ["", "abc", "-1", "2.5"])
def test_odd_numbers_of_processes(with_data: Data, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    with_data("plain")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable} is '{value}', not a number of processes. Export {variable}=4"):
        main(["train", *CPU])


@pytest.mark.parametrize(("value", "message"), [("", "is not set"), (" ", "is not set"), ("{absent}", "is no folder")])
def test_odd_folders(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, message: str
) -> None:
    with_data("plain")
    monkeypatch.setenv("nnUNet_preprocessed", value.format(absent=tmp_path / "absent"))
    with pytest.raises(UserError, match=message):
        main(["train", *CPU])


def test_a_users_failing_module(with_data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_data("plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_trainer.py").write_text("import not_installed_here\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"my_trainer.py, which nnUNet_extTrainer names, cannot be imported .*not_inst"):
        main(["train", *CPU, "-tr", "nnsslTrainer_VolumeFusion"])
    with pytest.raises(UserError, match="target_trainer: trainer 'Mine' cannot be looked up"):
        main(["plan", "-d", "811", "-o", "new", "target_trainer=Mine"])


def test_the_command_of_new_plans_is_for_the_full_resolution(
    with_data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net lists 3d_lowres first."""
    environment = with_data("plain")
    plans = environment.plans("plain")
    plans["configurations"] = dict(reversed(plans["configurations"].items()))
    (environment.dataset("plain") / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert main(["plan", "-d", "811", "-o", "new", "epochs=3"]) == 0
    assert "use it with: nnUNetv2_train 811 3d_fullres FOLD -p new -tr" in capsys.readouterr().out


def test_plans_and_data_sets_that_stock_takes_for_others(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "copied", {}, lambda plans: plans.update(dataset_name="Dataset004_Other"))
    with pytest.raises(UserError, match=r"copied.json is for Dataset004_Other, whose data nnU-Net would take"):
        main(["train", *CPU, "-p", "copied"])
    environment.write_plans("plain", "renamed", {}, lambda plans: plans.update(plans_name="nnUNetPlans"))
    with pytest.raises(UserError, match=r"renamed.json has the plans_name 'nnUNetPlans', .* Set it to 'renamed'"):
        main(["train", *CPU, "-p", "renamed"])
    (environment.root / "raw" / "Dataset8110_Other").mkdir()
    with pytest.raises(UserError, match="nnU-Net finds Dataset8110_Other for number 811, too. Give the name"):
        main(["train", *CPU])


def test_json_that_stock_cannot_read(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    path = environment.dataset("plain") / "dataset.json"
    sound = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + sound)
    with pytest.raises(UserError, match=r"dataset.json begins with a byte-order mark, which nnU-Net cannot read"):
        main(["train", *CPU])
    assert main(["plan", "-d", "811", "-o", "new", "epochs=3"]) == 0  # ours can
    path.write_text(sound.decode().replace("{", '{"name": "M\u00fcnchen", ', 1), encoding="utf-8")
    finished = environment.run(
        *(sys.executable, "-X", "utf8=0", "-m", "nnssl_ext.train", *CPU),
        status=1,
        variables={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )
    assert "dataset.json is UTF-8, which nnU-Net does not read in this locale. Export PYTHONUTF8=1" in finished.stderr


def test_the_command_is_in_utf8_whatever_the_locale(environment: Environment) -> None:
    finished = environment.run(
        *("nnssl_ext", "plan", "-d", "Dataset004_M\u00fcnchen", "-o", "new"),
        status=1,
        variables={"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
    )
    assert "expected one data set Dataset004_M\u00fcnchen" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("page", r"w.pth is no checkpoint that can be read"),
        ({"state_dict": {}}, "w.pth has no 'network_weights', which nnU-Net expects. Fit it with nnssl_ext transfer"),
        ({"network_weights": {}}, r"'encoder.stages.0.0.convs.0.conv.weight' is missing and \d+ more tensors"),
        ("narrow", r"conv.weight' is \(7, 1, 3, 3, 3\) there, expected \(\d+, 1, 3, 3, 3\) and .*nnssl_ext transfer"),
    ],
)
def test_weights_that_do_not_fit(with_data: Data, tmp_path: Path, content: Any, message: str) -> None:
    with_data("plain")
    file = tmp_path / "w.pth"
    first = "encoder.stages.0.0.convs.0.conv.weight"
    content = {"network_weights": {first: torch.zeros(7, 1, 3, 3, 3)}} if content == "narrow" else content
    if content == "page":
        file.write_text("<!DOCTYPE html><html>404</html>")
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as error:
        main(["train", *CPU, "-pretrained_weights", str(file)])
    assert len(str(error.value)) < 600


def test_the_advice_for_weights_names_plans_and_trainer(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "other", {})
    file = tmp_path / "my weights.pth"
    torch.save({"network_weights": {}}, file)
    options = ["-p", "other", "-tr", "nnsslTrainer_Finetune"]
    with pytest.raises(UserError) as error:
        main(["train", *CPU, *options, "-pretrained_weights", str(file)])
    advice = shlex.split(str(error.value).partition("Fit it with ")[2])
    words = ["nnssl_ext", "transfer", str(file), "-d", "811", "-c", "3d_fullres", *options, "-o", "FILE"]
    assert advice == words
    network = planned_network(environment.plans("plain"))
    torch.save({"network_weights": network.state_dict()}, file)
    assert main([*advice[1:-1], str(tmp_path / "fitted.pth")]) == 0


def test_the_advice_for_weights_that_transfer_does_not_fit(with_data: Data, tmp_path: Path) -> None:
    with_data("plain")
    torch.save({"network_weights": {}}, file := tmp_path / "w.pth")
    words = ["-device", "cpu", "-pretrained_weights", str(file)]
    with pytest.raises(UserError, match=r"more tensors. Give it to nnssl_ext plan as start_from=.*w.pth"):
        main(["train", "811", "3d_fullres", "0", "-tr", "nnsslTrainer_VolumeFusion", *words])
    with pytest.raises(UserError, match="A cascade stage takes weights of a cascade stage only"):
        main(["train", "811", "3d_cascade_fullres", "0", *words])


@pytest.mark.usefixtures("two_blocks")
def test_weights_of_other_outputs_than_the_methods_are_refused(with_data: Data, tmp_path: Path) -> None:
    """Primus has no heads that stock leaves out."""
    environment = with_data("plain")
    environment.write_plans("plain", "primus", {"target_trainer": STOCK})
    manager = PlansManager(environment.plans("plain"))
    network = target_network(manager, manager.get_configuration("3d_fullres"), 1, 2, trainer=STOCK)
    torch.save({"network_weights": network.state_dict()}, file := tmp_path / "w.pth")
    words = ["-p", "primus", "-tr", "nnsslTrainer_VolumeFusion", "-device", "cpu", "-pretrained_weights", str(file)]
    with pytest.raises(UserError, match="'up_projection.* Give it to nnssl_ext plan as start_from=.*w.pth"):
        main(["train", "811", "3d_fullres", "0", *words])


def test_a_finished_model_is_not_replaced_and_other_folds_are_told(
    with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("plain")
    dataset = environment.dataset("plain").name
    identity = {"dataset": dataset, "fold": 1}
    content = {"network_weights": planned_network(environment.plans("plain")).state_dict()}
    torch.save({**content, "nnssl_ext": {"identity": identity}}, file := tmp_path / "w.pth")
    words = ["811", "3d_fullres", "0", "-device", "cpu", "-pretrained_weights", str(file)]
    _check(words, None)
    assert "was pretrained on fold 1. It has seen validation images of fold 0" in capsys.readouterr().out
    fold = environment.results / dataset / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    with pytest.raises(UserError, match="fold_0 holds a finished training, which this would replace. To keep it, set"):
        _check(words, None)
    _check([*words[:-2], "--val"], None)
    torch.save(content, file)
    assert main(["transfer", str(file), "-d", "811", "-c", "3d_fullres", "-o", str(tmp_path / "init.pth")]) == 0
    assert "note: this replaces the model in " in capsys.readouterr().out


def test_other_plans_of_the_name_are_told(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    with_data("plain")
    for words, told in ((["epochs=3"], False), (["epochs=3"], False), (["epochs=4"], True)):
        assert main(["plan", "-d", "811", "-o", "new", *words]) == 0
        assert ("held other plans" in capsys.readouterr().out) == told


def test_more_processes_than_samples(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    with_data("plain")
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 GPUs share a batch of 2, and each needs a sample. Use fewer GPUs"):
        _check(["811", "3d_fullres", "0"], None)


def test_a_trainer_of_an_older_nnunet_builds_its_network(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the class and its arguments in place of the plans, as stock still calls it."""
    (tmp_path / "older.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "from nnunetv2.utilities.get_network_from_plans import get_network_from_plans\n"
        "class OlderTrainer(nnUNetTrainer):\n"
        "    @staticmethod\n"
        "    def build_network_architecture(name, kwargs, kwargs_req_import,\n"
        "                                   num_input_channels, num_output_channels, enable_deep_supervision=True):\n"
        "        return get_network_from_plans(name, kwargs, kwargs_req_import,\n"
        "                                      num_input_channels, num_output_channels,\n"
        "                                      deep_supervision=enable_deep_supervision)\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path), prepend=os.pathsep)
    manager = PlansManager(with_data("plain").plans("plain"))
    network = target_network(manager, manager.get_configuration("3d_fullres"), 3, 5, trainer="OlderTrainer")
    stock = target_network(manager, manager.get_configuration("3d_fullres"), 3, 5)
    shapes = [{name: tensor.shape for name, tensor in n.state_dict().items()} for n in (network, stock)]
    assert shapes[0] == shapes[1]


def planned_network(plans: dict, outputs: int = 2) -> torch.nn.Module:
    manager = PlansManager(plans)
    return target_network(manager, manager.get_configuration("3d_fullres"), 1, outputs)


def test_weights_that_fit_pass_with_other_heads(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("plain")
    plans = environment.plans("plain")
    dataset_json = json.loads((environment.dataset("plain") / "dataset.json").read_text())
    torch.save({"network_weights": planned_network(plans, outputs=9).state_dict()}, tmp_path / "w.pth")
    check_stock_weights(tmp_path / "w.pth", nnUNetTrainer, plans, "3d_fullres", dataset_json)


def test_small_shared_memory_and_read_only_data(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    monkeypatch.setenv("nnUNet_n_proc_DA", "4")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 0, 1 << 16))
    with pytest.raises(UserError, match=r"/dev/shm has 0.1 MiB free, \d+ workers with .* --shm-size=8g"):
        main(["train", *CPU])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    check_shared_memory(1 << 40, 0)
    (environment.dataset("plain") / "splits_final.json").unlink(missing_ok=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is read-only and has no splits_final.json"):
        main(["train", *CPU])
    check_split(environment.dataset("plain"), "all")


def test_without_asserts_and_docstrings(environment: Environment) -> None:
    """As PYTHONOPTIMIZE=2: no assert of ours carries behavior, no help needs a docstring."""
    printed = environment.run(sys.executable, "-OO", "-m", "nnssl_ext", "--help").stdout
    assert "transfer" in printed
    asserts = [
        f"{path.relative_to(REPOSITORY)}: {ast.unparse(node)}"
        for path in (REPOSITORY / "nnssl_ext").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith("is not None")
    ]
    assert asserts == []
