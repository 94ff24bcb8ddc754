"""The study over tasks of the Decathlon: one folder each, and what it will cost."""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable

import pytest

from nnssl_ext.cli import main
from nnssl_ext.cli import study as command
from nnssl_ext.errors import UserError
from nnssl_ext.study.study import Study
from tests.conftest import Environment

WORDS = [
    "-c",
    "3d_fullres",
    "-device",
    "cpu",
    "--methods",
    "scratch",
    "VolumeFusion",
    "--labels",
    "2",
    "--subsets",
    "2",
]
WORDS += ["--steps", "4", "--snapshots", "2", "--total-baseline", "1", "--rates", "0.01"]
WORDS += ["-o", "STUDY", "epochs=3", "iterations_per_epoch=2"]
#: One pretraining of 6 steps, two pairs of 4, one total baseline of 4 + 6.
COST = r"6 runs, 32 steps at [\d.e-]+ s: about [\d.e-]+ h on one device"


@pytest.fixture
def tasks(with_data: Callable[[str], Environment], monkeypatch: pytest.MonkeyPatch) -> Environment:
    environment = with_data("labelled")
    for dataset in ("Dataset002_Heart", "Dataset004_Hippocampus"):
        folder = environment.preprocessed / dataset
        shutil.copytree(environment.dataset("labelled"), folder)
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        (folder / "nnUNetPlans.json").write_text(json.dumps({**plans, "dataset_name": dataset}))
    monkeypatch.chdir(environment.root)
    return environment


def test_the_estimate_comes_first_and_tells_all_tasks(tasks: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "--msd", "Task02", "Hippocampus", "--estimate", *WORDS])
    said = capsys.readouterr().out
    assert re.search(rf"Dataset002_Heart: {COST}", said)
    assert re.search(rf"Dataset004_Hippocampus: {COST}", said)
    assert re.search(r"together: about", said)
    assert not list((tasks.root / "STUDY").rglob("results"))


def test_each_task_has_its_folder(tasks: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, float]] = []

    def note(study: Study, _: Namespace) -> str:
        ran.append((study.folder.name, study.protocol.tolerance))
        return ""

    monkeypatch.setattr(command, "_run", note)
    main(["study", "--msd", "Task02", "Task04", *WORDS])
    assert ran == [("Task02_Heart", 4.0), ("Task04_Hippocampus", 1.0)]


def test_a_task_that_is_not_there(tasks: Environment) -> None:
    with pytest.raises(UserError, match="expected one data set Dataset003_Liver"):
        main(["study", "--msd", "Task04", "Task03", *WORDS])
    assert not (tasks.root / "STUDY").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["study", *WORDS])
