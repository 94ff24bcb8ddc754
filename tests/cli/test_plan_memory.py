"""``nnssl_ext plan`` says what a step needs, and finds the batch for a GPU."""

import json
import re
from collections.abc import Callable

import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.training.checks import check_plans
from tests.conftest import Environment

Data = Callable[[str], Environment]


def plan(*words: str) -> int:
    return main(["plan", "-d", "811", "-c", "3d_fullres", "-o", "new", *words])


def test_an_estimate_is_printed(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    with_data("plain")
    plan()
    assert re.search(
        r"3d_fullres: VolumeFusion needs 2\.0 GiB at batch 2 of 16 x 16 x 16, 0\.00 each\n", capsys.readouterr().out
    )
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


def test_a_target_sets_the_batch_of_the_crops_that_are_read(
    with_data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    """3DINO takes smaller crops than the plans' patch unless a batch is set."""
    environment = with_data("plain")
    patch = "configuration.patch_size=[48,48,48]"
    plan(patch, "--method", "dino")
    small = re.search(r"at batch (\d+) of ([\dx ]+),", capsys.readouterr().out)
    assert small
    assert (int(small[1]), small[2]) == sampling(environment)
    assert small[2] != "48 x 48 x 48"
    plan(patch, "--method", "dino", "--gpu-memory-target", "4")
    printed = re.search(r"at batch (\d+) of ([\dx ]+),", capsys.readouterr().out)
    assert printed
    assert (int(printed[1]), printed[2]) == sampling(environment)
    assert printed[2] == "48 x 48 x 48"


def sampling(environment: Environment) -> tuple[int, str]:
    """Batch and crop of 3DINO's run with the plans that were written."""
    content = json.loads((environment.dataset("plain") / "dataset.json").read_text())
    _, _, geometry, batch = check_plans(DINO, environment.plans("plain", "new"), "3d_fullres", content)
    return batch, " x ".join(map(str, geometry.crop_size))


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
