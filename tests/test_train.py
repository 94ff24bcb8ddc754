from collections.abc import Callable

import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from tests.conftest import Environment

Data = Callable[[str], Environment]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["999", "3d_fullres", "0"], r"expected one data set Dataset999_\* in"),
        (["811", "3d_fullres", "0", "-p", "nnUNetPlan"], "has no plans 'nnUNetPlan'; it has nnUNetPlans"),
        (["811", "3d_fulres", "0"], "plans nnUNetPlans have no configuration '3d_fulres'; they have 2d, 3d_fullres"),
        (["811", "3d_fullres", "first"], "fold must be 'all' or a number, got 'first'"),
        (["811", "3d_fullres", "0", "-pretrained_weights", "absent.pth"], "absent.pth does not exist"),
        (
            ["811", "3d_fullres", "0", "-tr", "nnsslTrainer_VolumeFuison"],
            r"trainer 'nnsslTrainer_VolumeFuison' was not found; did you mean 'nnsslTrainer_VolumeFusion'\?",
        ),
        (["811", "3d_fullres", "0", "-tr", "nnUNetTrainr"], r"did you mean 'nnUNetTrainer'\?"),
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
    with pytest.raises(UserError, match=f"{variable} is not set; export it"):
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
