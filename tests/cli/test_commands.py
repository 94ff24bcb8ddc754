import json
from collections.abc import Callable

import pytest

from nnssl_ext import __version__
from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, TRAINERS
from tests.conftest import REPOSITORY, Environment

Data = Callable[[str], Environment]


def test_trainers_prints_one_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["trainers"]) == 0
    assert capsys.readouterr().out == f"{REPOSITORY / 'trainers'}\n"
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    main(["trainers", "--append"])
    assert capsys.readouterr().out == f"/mine:{REPOSITORY / 'trainers'}\n"


def test_methods_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert TRAINERS[method.name] in printed
        assert method.citation in printed


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["absent"], ["plan"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert __version__ in capsys.readouterr().out


def plan(*words: str) -> int:
    return main(["plan", "-d", "811", "-c", "3d_fullres", *words])


def test_plan_derives(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")
    source = environment.plans("plain")
    assert plan("-o", "nnUNetPlans_vf", "volume_fusion", "cpu_small", "epochs=7", "volume_fusion.levels=3") == 0
    derived = environment.plans("plain", "nnUNetPlans_vf")
    assert derived["plans_name"] == "nnUNetPlans_vf"
    assert derived["nnssl_ext"]["epochs"] == 7
    assert derived["nnssl_ext"]["volume_fusion"]["levels"] == 3
    assert derived["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] == [
        16,
        32,
        64,
    ]
    assert derived["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert environment.plans("plain") == source
    # derived plans may be derived anew
    assert plan("-o", "nnUNetPlans_vf", "epochs=8") == 0
    assert environment.plans("plain", "nnUNetPlans_vf")["nnssl_ext"] == {"epochs": 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "new", "volumefusion"], "unknown recipe 'volumefusion'; did you mean 'volume_fusion'?"),
        (["-o", "new", "epoch=3"], "command line: unknown setting 'epoch'; did you mean 'epochs'?"),
        (["-o", "new", "epochs=many"], "command line: setting 'epochs' must be int, got 'many' (str)"),
        (["-o", "new", "configuration.patch=3"], "unknown setting 'configuration.patch'"),
        (["-o", "new", "crop_size=[16,18,16]"], "crop edge 18 (axis 1"),
        (["-o", "a__b"], "plans name 'a__b' cannot be used"),
        (["-o", "../b"], "plans name '../b' cannot be used"),
        (["-o", "nnUNetPlans"], "would overwrite the plans it starts from"),
        (["-o", "foreign"], "exists and was not made by nnssl_ext plan"),
        (["-o", "new", "-p", "absent"], "cannot read"),
        (["-o", "new", "-c", "2d"], "have no 3-D configuration '2d'. They have 3d_fullres, 3d_lowres"),
    ],
)
def test_plan_refuses(with_data: Data, words: list[str], message: str) -> None:
    environment = with_data("plain")
    (environment.dataset("plain") / "foreign.json").write_text("{}")
    before = sorted(p.name for p in environment.dataset("plain").iterdir())
    with pytest.raises(UserError) as error:
        plan(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in environment.dataset("plain").iterdir()) == before
    assert json.loads((environment.dataset("plain") / "foreign.json").read_text()) == {}


def test_dataset_is_looked_up_by_number_and_name(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    assert main(["plan", "-d", "Dataset811_Plain", "-o", "new"]) == 0
    for dataset, message in (("812", "expected one data set Dataset812_*"), ("hippo", "got 'hippo'")):
        with pytest.raises(UserError) as error:
            main(["plan", "-d", dataset, "-o", "new"])
        assert message in str(error.value)
    (environment.preprocessed / "Dataset811_Twin").mkdir()
    with pytest.raises(UserError, match="found Dataset811_Plain, Dataset811_Twin"):
        main(["plan", "-d", "811", "-o", "new"])
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UserError, match="nnUNet_preprocessed is not set"):
        main(["plan", "-d", "811", "-o", "new"])


def test_plan_takes_what_stock_takes_and_prints_what_can_be_pasted(
    with_data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("plain")

    def inherit(plans: dict) -> None:
        plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}

    environment.write_plans("plain", "own", {}, inherit)
    assert main(["plan", "-d", "811", "-p", "own", "-c", "mine", "-o", "my plans", "epochs=1"]) == 0
    assert "nnUNetv2_train 811 mine FOLD -p 'my plans' -tr" in capsys.readouterr().out
    derived = environment.plans("plain", "my plans")["configurations"]
    assert derived["mine"] == {**derived["3d_fullres"], "batch_size": 4}


def test_plan_renames_the_settings_of_old_plans(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")
    path = environment.dataset("plain") / "old.json"
    environment.write_plans("plain", "old", {"most_nonfinite": 3, "finetune": {"average": 0.5}})
    with pytest.raises(UserError, match="'most_nonfinite' is called 'max_nonfinite_batches' since version 0.2"):
        main(["plan", "-d", "811", "-p", "old", "-o", "new"])
    assert main(["plan", "--rename-settings", str(path)]) == 0
    assert "most_nonfinite -> max_nonfinite_batches" in capsys.readouterr().out
    renamed = environment.plans("plain", "old")["nnssl_ext"]
    assert renamed["max_nonfinite_batches"] == 3
    assert renamed["finetune"] == {"weight_average_decay": 0.5}
    assert main(["plan", "-d", "811", "-p", "old", "-o", "new"]) == 0
    assert main(["plan", "--rename-settings", str(path)]) == 0
    assert "no old names" in capsys.readouterr().out


def test_options_of_a_training_may_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    monkeypatch.setattr("nnssl_ext.train.train", found.append)
    for words in (
        ["-device", "cpu", "4", "3d_fullres", "0"],
        ["--max-time", "20", "4"],
        ["4", "3d_fullres", "0", "--c"],
    ):
        main(["train", *words])
    assert found == [
        ["-device", "cpu", "4", "3d_fullres", "0"],
        ["--max-time", "20", "4"],
        ["4", "3d_fullres", "0", "--c"],
    ]
