"""Places and times of a study's runs."""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from nnssl_ext.environment import MAX_TIME
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json
from nnssl_ext.study.grid import Grid, Run
from nnssl_ext.study.runner import _Clock, environment, keep_metrics, run_grid, slots
from tests.study.test_analysis import planted


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl_ext.study.runner.cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    places = slots("cuda", 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["3", "3", "5", "5"]
    assert {place["nnUNet_n_proc_DA"] for place in places} == {"2"}
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert {place["nnUNet_n_proc_DA"] for place in slots("cuda", 2)} == {"0"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots("cuda", 1)] == ["0", "1", "2"]


def test_seconds_before_an_interruption_count(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "run.seconds"
    assert 0 <= _Clock(file).note() < 5
    file.write_text("100.0")
    assert 100 <= _Clock(file).note() < 105


def test_cpu_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl_ext.study.runner.cores", lambda: 8)
    assert [slot["OMP_NUM_THREADS"] for slot in slots("cpu", 3)] == ["2"] * 3


def test_checkpoints_that_a_kill_left_behind_are_dropped(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    left = grid.fold_folder(run) / "checkpoint_latest.pth"
    left.parent.mkdir(parents=True)
    for keep, kept in ((False, False), (True, True), (False, True)):  # once asked for, a later call keeps them too
        left.write_bytes(b"weights")
        grid.keep_checkpoints = keep
        run_grid(grid, [])
        assert left.is_file() == kept


def test_a_run_whose_predictions_cannot_be_read_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = planted(tmp_path, 0.0)
    runs = grid.compared(grid.arms[0], 0.01)[:2]
    for run in runs:
        grid.metrics_file(run).unlink()
        summary = grid.fold_folder(run) / "validation" / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")

    def unreadable(*_: object) -> None:
        raise RuntimeError("cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr("nnssl_ext.study.runner.keep_metrics", unreadable)
        run_grid(grid, slots("cpu", 2))
    assert set(grid.failures()) == set(runs)
    assert "RuntimeError: cannot be read" in grid.log_file(runs[0]).read_text()
    # one of the predictions may be torn: the next call makes them again
    assert not any(list(grid.fold_folder(run).glob("validation*")) for run in runs)


def test_an_error_in_finding_the_next_run_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = planted(tmp_path, 0.0)

    def broken(_: object) -> None:
        raise OSError("damaged")

    monkeypatch.setattr(Grid, "ready", broken)
    with pytest.raises(OSError, match="damaged"):
        run_grid(grid, slots("cpu", 2))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_study_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The run's command is asked to end too, and is not marked as failed."""
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    grid.metrics_file(run).unlink()
    monkeypatch.setattr(Grid, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    threading.Timer(1.5, os.kill, (os.getpid(), getattr(signal, name))).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_grid(grid, slots("cpu", 1))
    assert ended.value.code == 128 + getattr(signal, name)
    assert time.monotonic() - began < 20
    assert f"Stopped by {name}: " in capsys.readouterr().err
    assert grid.failures() == {}


def test_predictions_of_other_cases_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    other = pd.DataFrame({"case": ["another.nii.gz"], "dice": [0.5]})
    monkeypatch.setattr("nnssl_ext.study.runner.fold_metrics", lambda *_: other)
    monkeypatch.setattr(Grid, "reader", None)
    (grid.fold_folder(run) / "validation_step_000300").mkdir(parents=True)
    cases = len(grid.folds[run.fold]["val"])
    with pytest.raises(
        UserError, match=f"expected predictions of the {cases} cases of the split, got 1, 1 of them oth"
    ):
        keep_metrics(grid, run, 1.0)


def test_no_run_leaves_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_TIME, "1")
    grid = planted(tmp_path, 0.0)
    assert environment(grid, grid.all_runs()[0], {})[MAX_TIME] == ""


def test_a_run_without_a_snapshot_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    step, *others = grid.protocol.snapshots
    for other in others[:-1]:
        (grid.fold_folder(run) / f"validation_step_{other:06d}").mkdir(parents=True)
    grid.metrics_file(run).unlink()
    kept = grid.fold_folder(run) / "validation"
    kept.mkdir(parents=True)
    (kept / "summary.json").write_text("{}")
    run_grid(grid, slots("cpu", 1))
    assert f"got none after [{step}]: a checkpoint was not" in grid.failures()[run].read_text()
    assert kept.is_dir()  # to predict again would not help


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_no_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    grid.metrics_file(run).unlink()
    summary = grid.fold_folder(run) / "validation" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text("{}")

    def full(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    def measure(grid: Grid, run: Run, _: float) -> None:
        write_json({}, grid.metrics_file(run).with_suffix(".json"))

    monkeypatch.setattr("nnssl_ext.study.runner.keep_metrics", measure)
    monkeypatch.setattr("nnssl_ext.recipe.replaced_on_success", full)
    with pytest.raises(UserError, match=rf"{os.strerror(error)}\. Make room and call the same command again"):
        run_grid(grid, slots("cpu", 1))
    assert summary.is_file()
    assert grid.failures() == {}
