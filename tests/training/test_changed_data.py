"""Data that is damaged, vanishes or changes under a run: named, left out up to a share, then the run stops."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnssl_ext import checkpoint
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from tests.conftest import Environment
from tests.support.runs import TRAINER, at_step, cases, fault, pretrain, replace_case, same_run

Data = Callable[[str], Environment]
RUN = {"epochs": 2, "iterations_per_epoch": 4, "save_every": 1}


def log_of(fold: Path) -> str:
    return "".join(path.read_text() for path in sorted(fold.glob("training_log_*")))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: np.where(data == data.max(), np.nan, data), "holds NaN or infinite values"),
        (np.zeros_like, "is constant"),
        (lambda data: np.concatenate([data, data]), "has 2 channels, the plans expect 1"),
    ],
)
def test_a_bad_case_is_left_out_up_to_a_share(
    with_data: Data, change: Callable[[np.ndarray], np.ndarray], problem: str
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "epochs": 1, "max_unreadable_fraction": 0.2})
    replace_case(environment, change)
    fold = pretrain(environment, "plain", "run", "all")
    assert f"cannot be read and is skipped (1 so far): case 'case_03' in {cases(environment)}: {problem}" in log_of(
        fold
    )
    assert checkpoint.load(fold / "checkpoint_final.pth")["nnssl_ext"]["data"]["case_03"] == ""
    (cases(environment) / "case_04.b2nd").write_bytes(b"")
    with pytest.raises(
        UserError, match="case 'case_03' .*, case 'case_04' cannot be read.*max_unreadable_fraction=0.2"
    ):
        pretrain(environment, "plain", "run", "all")


@pytest.mark.parametrize("fault", ["vanished", "torn", "replaced"])
def test_a_case_that_goes_bad_amid_the_run(with_data: Data, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "max_unreadable_fraction": 0.2})
    environment.write_plans("plain", "strict", RUN)
    path, kept = cases(environment) / "case_03.b2nd", environment.root / "kept"
    shutil.copy(path, kept)

    def break_it() -> None:
        if fault == "vanished":
            path.unlink()
        elif fault == "torn":
            path.write_bytes(kept.read_bytes()[:3000])
        else:
            path.unlink()
            blosc2.asarray(np.ones((1, 9, 9, 9), np.float32), urlpath=str(path), mode="w")

    with monkeypatch.context() as patch:
        at_step(1, patch, break_it)
        fold = pretrain(environment, "plain", "run", "all")
        assert "cannot be read and is skipped (1 so far): case 'case_03'" in log_of(fold)
        shutil.copy2(kept, path)
        with pytest.raises(
            UserError, match=r"1 of 6 cases cannot be read, more than max_unreadable_fraction=0.05 .*'case_03'"
        ):
            pretrain(environment, "plain", "strict", "all")
    # nothing is lost: repaired, the run goes on where it stopped, and equals one that never met the fault
    shutil.copy2(kept, path)
    environment.write_plans("plain", "whole", RUN)
    broken = pretrain(environment, "plain", "strict", "all", c=True)
    same_run(pretrain(environment, "plain", "whole", "all"), broken)


def test_a_worker_that_is_killed_amid_the_run_changes_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = with_data("plain")
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, RUN)
    whole = pretrain(environment, "plain", "whole", "all")
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    fault(monkeypatch, tmp_path / "flag", 7, signal.SIGKILL)
    broken = pretrain(environment, "plain", "broken", "all")
    assert "was killed by signal 9 while reading sample 7 (case_" in log_of(broken)
    same_run(whole, broken)


def test_another_data_set_under_a_continued_run_is_refused(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "epochs": 1})
    pretrain(environment, "plain", "run", "all")
    replace_case(environment, lambda data: data[:, ::-1] * 2)
    shutil.copy(cases(environment) / "case_02.b2nd", cases(environment) / "case_99.b2nd")
    (cases(environment) / "case_01.b2nd").unlink()
    environment.write_plans("plain", "run", {**RUN, "epochs": 2})
    with pytest.raises(
        UserError, match=r"another state of the data set: 1 gone \(case_01\); 1 new \(case_99\); 1 changed \(case_03\)"
    ):
        pretrain(environment, "plain", "run", "all", c=True)


def test_copied_data_is_the_same_data(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "epochs": 1})
    pretrain(environment, "plain", "run", "all")
    moved = environment.root / "moved"
    shutil.copytree(cases(environment), moved)
    shutil.rmtree(cases(environment))
    shutil.move(moved, cases(environment))
    environment.write_plans("plain", "run", RUN)
    pretrain(environment, "plain", "run", "all", c=True)
    assert environment.fold("plain", "run", TRAINER, fold="all").is_dir()


def test_a_case_that_goes_bad_before_a_validation_loses_no_step(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("plain")
    for plans in ("whole", "strict"):
        environment.write_plans("plain", plans, {**RUN, "save_every": 2})
    original = PretrainingTrainer.validation_step

    def validation_step(self: PretrainingTrainer, batch: CropBatch) -> dict:
        return original(self, replace(batch, failure="case 'case_03' cannot be read"))

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "validation_step", validation_step)
        with pytest.raises(UserError, match=r"'case_03' cannot be read. Repair it, then go on with --c"):
            pretrain(environment, "plain", "strict", "all")
    latest = environment.fold("plain", "strict", TRAINER, fold="all") / "checkpoint_latest.pth"
    assert checkpoint.load(latest)["nnssl_ext"]["counters"]["step"] == 4
    broken = pretrain(environment, "plain", "strict", "all", c=True)
    same_run(pretrain(environment, "plain", "whole", "all"), broken)


def test_another_split_under_a_continued_run_is_refused(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "epochs": 1})
    fold = pretrain(environment, "plain", "run")
    before = (fold / "checkpoint_final.pth").read_bytes()
    file = environment.dataset("plain") / "splits_final.json"
    split = read_json(file, list)
    # the same cases in another order are the same split
    write_json([{name: names[::-1] for name, names in part.items()} for part in split], file)
    pretrain(environment, "plain", "run", val=True)
    moved = split[0]["val"].pop()
    write_json([{"train": [*split[0]["train"], moved], "val": split[0]["val"]}, *split[1:]], file)
    environment.write_plans("plain", "run", RUN)
    with pytest.raises(UserError, match=r"fold 0 of .* has other cases than when this run began. Restore splits_final"):
        pretrain(environment, "plain", "run", c=True)
    assert before in [path.read_bytes() for path in fold.glob("*.pth")]


def test_left_out_validation_cases_do_not_count(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "epochs": 1, "max_unreadable_fraction": 0.2})
    names = [f"case_0{number}" for number in range(6)]
    write_json([{"train": names[2:], "val": names[:2]}], environment.dataset("plain") / "splits_final.json")
    (cases(environment) / "case_00.b2nd").write_bytes(b"")
    assert "2 validation cases are too few: using training cases" not in log_of(
        fold := pretrain(environment, "plain", "run")
    )
    assert "1 validation cases are too few: using training cases instead" in log_of(fold)
