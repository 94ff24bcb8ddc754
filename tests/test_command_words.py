"""Commands that are printed can be pasted."""

import shlex

import pytest

from nnssl_ext.commands import TRAIN, RunName, dataset_number, dataset_word
from nnssl_ext.training.run.commands import continuation
from tests.conftest import Environment


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Dataset004_Tiny", "4"),
        ("Dataset1004_Tiny", "1004"),
        ("Dataset020_My-Data", "20"),
        ("Dataset12345_A_B", "12345"),
        ("Dataset5_Short", "Dataset5_Short"),
        ("Datasetfoo", "Datasetfoo"),
    ],
)
def test_the_number_is_in_the_name(environment: Environment, name: str, word: str) -> None:
    assert dataset_word(name) == word


def test_a_number_that_stock_finds_twice_is_not_used(environment: Environment) -> None:
    """nnU-Net takes 100 for Dataset1004_Other, too."""
    (environment.preprocessed / "Dataset100_Tiny").mkdir()
    assert dataset_word("Dataset100_Tiny") == "100"
    (environment.root / "raw" / "Dataset1004_Other").mkdir()
    assert dataset_word("Dataset100_Tiny") == "Dataset100_Tiny"
    assert dataset_word("Dataset1004_Other") == "1004"


def test_words_with_blanks_are_quoted(environment: Environment) -> None:
    run = RunName("Dataset1004_T", "3d_fullres", "0", "my plans", "nnsslTrainer_3DINO")
    line = run.command("/a b/c'd.pth")
    assert shlex.split(line) == [
        *("nnUNetv2_train", "1004", "3d_fullres", "0", "-p", "my plans", "-tr", "nnsslTrainer_3DINO"),
        *("-pretrained_weights", "/a b/c'd.pth"),
    ]
    assert RunName("Dataset004_T", "3d_fullres", "all").command() == "nnUNetv2_train 4 3d_fullres all"


def test_a_name_without_number_has_none() -> None:
    assert dataset_number("Dataset004_T") == 4
    with pytest.raises(ValueError, match="expected DatasetXXX_NAME, got 'Task04_T'"):
        dataset_number("Task04_T")


def test_within_our_program_a_trainer_of_ours_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """There no variable names the folder of our trainers."""
    ours = RunName("Dataset1004_T", "3d_fullres", "0", trainer="nnsslTrainer_3DINO")
    stock = RunName("Dataset1004_T", "3d_fullres", "0")
    assert ours.command().startswith("nnUNetv2_train 1004 3d_fullres")
    monkeypatch.setattr("sys.argv", [TRAIN, "1004", "3d_fullres", "0"])
    assert ours.command() == "nnssl_ext train 1004 3d_fullres 0 -tr nnsslTrainer_3DINO"
    assert stock.command().startswith("nnUNetv2_train")
    assert continuation(ours, "cpu") == f"{ours.command()} -device cpu --c"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("nnssl_ext.training.run.commands.world", lambda: 2)
    monkeypatch.setattr("nnssl_ext.training.run.commands.launched", lambda: True)
    words = "torchrun --standalone --nnodes=1 --nproc-per-node=2 -m nnssl_ext.train 1004 3d_fullres 0"
    assert continuation(ours, "cuda") == f"{words} -tr nnsslTrainer_3DINO --c"
