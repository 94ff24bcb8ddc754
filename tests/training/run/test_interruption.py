"""Asked to end, a run writes a checkpoint, says how to go on, and continued it equals the one that was never asked."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnssl_ext.cli import main
from nnssl_ext.environment import MAX_TIME, commands_path, time_limit
from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, TRAINERS
from tests.conftest import Environment
from tests.support.runs import TRAINER, pretrain, same_run, signal_at

Data = Callable[[str], Environment]


RUN = {"epochs": 3, "iterations_per_epoch": 3, "save_every": 2}


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_amid_an_epoch_loses_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    environment, trainer = with_data("plain"), TRAINERS[method]
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, RUN)
    whole = pretrain(environment, "plain", "whole", trainer=trainer)
    # amid an epoch; in its last step, while schedules still move; in the first of another; with other workers
    for step, number, workers in ((1, signal.SIGINT, "0"), (2, signal.SIGHUP, "1"), (6, signal.SIGTERM, "0")):
        monkeypatch.setenv("nnUNet_n_proc_DA", workers)
        with monkeypatch.context() as patch:
            signal_at(step, patch, number)
            with pytest.raises(SystemExit) as ended:
                pretrain(environment, "plain", "broken", trainer=trainer, c=step > 1)
        assert ended.value.code == 0
        line = f"Stopped by {number.name} after step {step + 1} of 9; nothing is lost. Go on with:"
        command = f"nnUNetv2_train 811 3d_fullres 0 -p broken -tr {trainer} -device cpu --c"
        assert f"{line}\n    {command}" in capsys.readouterr().out
    same_run(whole, pretrain(environment, "plain", "broken", trainer=trainer, c=True))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.real_commands
def test_killed_at_random_moments_through_the_command(with_data: Data) -> None:
    """SIGKILL whenever it comes, checkpoint writing included; SIGTERM once; then to the end."""
    environment = with_data("plain")
    # checkpoints all the time: the kill will often meet one being written
    settings = {"epochs": 30, "iterations_per_epoch": 1, "save_every": 1, "validation_iterations": 1}
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, settings)
    whole = pretrain(environment, "plain", "whole")
    fold = environment.fold("plain", "broken", TRAINER)
    words = ["nnUNetv2_train", "811", "3d_fullres", "0", "-tr", TRAINER, "-p", "broken", "-device", "cpu", "--c"]
    for number, seconds in ((signal.SIGKILL, 0.4), (signal.SIGTERM, 0.2)):
        before = _written(fold)
        process = subprocess.Popen(
            words,
            env={**os.environ, **environment.variables, "PATH": commands_path()},
            stdout=subprocess.PIPE,
            text=True,
        )
        while _written(fold) <= before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == (-number if number == signal.SIGKILL else 0)
    assert "Stopped by SIGTERM after step" in output
    assert not list(fold.glob("checkpoint_final.pth"))
    same_run(whole, pretrain(environment, "plain", "broken", c=True))
    assert {path.suffix for path in fold.iterdir()} <= {".pth", ".txt", ".json", ".png"}


def _written(fold: Path) -> float:
    latest = fold / "checkpoint_latest.pth"
    return latest.stat().st_mtime if latest.exists() else 0.0


def test_the_time_limit(with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {**RUN, "max_time": 1e-6})
    with pytest.raises(SystemExit) as ended:
        pretrain(environment, "plain", "run")
    assert ended.value.code == 0
    assert "Stopped by the time limit of 1e-06 h after step 1 of 9" in capsys.readouterr().out
    # the option goes before the setting, and reaches every process of the command
    environment.write_plans("plain", "run", {**RUN, "max_time": 1e-6})
    monkeypatch.setenv(MAX_TIME, "")
    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", lambda: None)
    monkeypatch.setattr("sys.argv", [])
    words = ["811", "3d_fullres", "0", "-tr", TRAINER, "-p", "run", "-device", "cpu"]
    main(["train", *words, "--c", "--max-time", "5"])
    assert sys.argv == ["nnssl_ext train", *words, "--c"]
    assert os.environ[MAX_TIME] == "5"
    assert (pretrain(environment, "plain", "run", c=True) / "checkpoint_final.pth").is_file()
    with pytest.raises(UserError, match="--max-time .* must be a positive number of hours, got 'soon'"):
        main(["train", *words, "--max-time", "soon"])


def test_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_limit(None) is None
    assert time_limit(2.0) == 2.0
    monkeypatch.setenv(MAX_TIME, "0.5")
    assert time_limit(2.0) == 0.5
    for text in ("-1", "nan", "0", "inf"):
        monkeypatch.setenv(MAX_TIME, text)
        with pytest.raises(UserError, match="positive number of hours"):
            time_limit(None)
