"""``nnssl_ext plan`` says what a step needs, and finds the batch for a GPU."""

import re
from collections.abc import Callable

import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from tests.conftest import Environment

Data = Callable[[str], Environment]


def plan(*words: str) -> int:
    return main(["plan", "-d", "811", "-c", "3d_fullres", "-o", "new", *words])


def test_an_estimate_is_printed(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    with_data("plain")
    plan()
    assert re.search(r"3d_fullres: VolumeFusion needs 2\.0 GiB at batch 2, 0\.00 a sample\n", capsys.readouterr().out)
    plan("batch_size=3", "dino.local_crops=2")
    printed = capsys.readouterr().out
    assert "3DINO needs" in printed
    assert "at batch 3" in printed
    assert "VolumeFusion" not in printed
    plan("--method", "jigsaw", "exemplar")
    printed = capsys.readouterr().out
    assert "Jigsaw needs" in printed
    assert "Exemplar needs" in printed


def test_the_largest_batch_that_fits_is_set(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")

    def batch(*words: str) -> int:
        plan(*words)
        return environment.plans("plain", "new")["nnssl_ext"]["batch_size"]

    fusion = batch("--gpu-memory-target", "3")
    assert f"batch_size {fusion} is the largest that fits\n" in capsys.readouterr().out
    assert 100 < fusion < batch("--gpu-memory-target", "5")
    exemplar = batch("--gpu-memory-target", "3", "--method", "exemplar")
    both = batch("--gpu-memory-target", "3", "--method", "exemplar", "volume_fusion")
    assert both == min(fusion, exemplar)
    # a batch that is named is a limit
    assert batch("batch_size=5", "--gpu-memory-target", "3") == 5
    assert batch("batch_size=100000", "--gpu-memory-target", "3") == fusion
    assert f"batch_size {fusion} is the largest that fits; 100000 was named" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-memory-target", "0.5"], "not even batch 1 of VolumeFusion fits --gpu-memory-target 0.5"),
        (["--gpu-memory-target", "1", "--method", "dino"], "activation_checkpointing=true ("),
        (["--gpu-memory-target", "-1"], "must be a positive number of GB, got -1"),
        (["--gpu-memory-target", "nan"], "must be a positive number of GB, got nan"),
        (["--method", "jigsav"], "--method: unknown method 'jigsav'; did you mean 'jigsaw'?"),
    ],
)
def test_what_cannot_be_is_one_line(with_data: Data, words: list[str], message: str) -> None:
    environment = with_data("plain")
    with pytest.raises(UserError) as error:
        plan(*words)
    assert message in error.value.line
    assert not (environment.dataset("plain") / "new.json").exists()
