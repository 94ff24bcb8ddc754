"""The fine-tuner is asked to end, killed, or loses a worker. Continued it equals the run that was not."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.data import loader
from nnssl_ext.environment import commands_path
from nnssl_ext.errors import UserError
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
from nnssl_ext.training.run.folder import LATEST
from tests.conftest import Environment
from tests.support.finetunings import (
    NAME,
    WORDS,
    asked_to_end,
    final,
    fold,
    kill_at,
    plans,
    same_run,
    signal_at,
    tune,
)
from tests.support.runs import at_step, cases

Data = Callable[[str], Environment]
pytestmark = pytest.mark.usefixtures("training_only")


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_average_decay": 0.9},
        {"optimizer": "adamw", "head_only_steps": 2, "freeze_encoder_steps": 5, "warmup": 2, "save_every": 2},
    ],
)
def test_a_signal_amid_an_epoch_loses_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: dict
) -> None:
    environment = with_data("labelled")
    plans(environment, "whole", "broken", **settings)
    whole = tune(environment, "labelled", "whole")
    # amid an epoch and before a snapshot, in an epoch's last step, in its first, in the run's last
    at = ((1, signal.SIGTERM), (5, signal.SIGUSR1), (6, signal.SIGINT), (7, signal.SIGHUP))
    for step, number in at:
        monkeypatch.setenv("nnUNet_n_proc_DA", str(step % 2))
        torch.manual_seed(step)  # a new process starts with another state
        np.random.seed(step)
        with monkeypatch.context() as patch:
            signal_at(step, patch, number)
            asked_to_end(environment, c=step > 1)
        line = f"Stopped by {number.name} after step {step + 1} of 8; nothing is lost. Go on with:"
        output = capsys.readouterr().out
        assert f"{line}\n    {' '.join(WORDS[:4])} -p broken -tr {NAME} -device cpu --c" in output
        content = checkpoint.load(fold(environment) / LATEST)
        assert content["nnssl_ext"]["step"] == step + 1
        assert 0 < content["epoch_seconds"] < 600
    same_run(whole, tune(environment, "labelled", "broken", c=True))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_amid_the_last_validation_is_answered_before_the_long_one(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, validated = with_data("labelled"), list[str]()
    plans(environment, "whole", "broken")
    whole = tune(environment, "labelled", "whole")
    monkeypatch.setattr(nnsslTrainer_Finetune, "perform_actual_validation", lambda self, _: validated.append(self.fold))
    with monkeypatch.context() as patch:
        signal_at(8, patch, signal.SIGTERM, method="validation_step")
        asked_to_end(environment)
    assert "Stopped by SIGTERM after step 8 of 8; nothing is lost" in capsys.readouterr().out
    assert validated == []
    same_run(whole, tune(environment, "labelled", "broken", c=True))
    assert validated == [0]


def test_the_time_limit(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("labelled")
    plans(environment, "broken", common={"max_time": 1e-6})
    asked_to_end(environment)
    assert "Stopped by the time limit of 1e-06 h after step 1 of 8; nothing is lost" in capsys.readouterr().out
    plans(environment, "whole", "broken")
    same_run(tune(environment, "labelled", "whole"), tune(environment, "labelled", "broken", c=True))


def test_the_newest_checkpoint_knows_the_best_so_far(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock writes checkpoint_latest.pth first: a continued run would take a worse epoch for the best."""
    environment = with_data("labelled")
    plans(environment, "broken")
    with monkeypatch.context() as patch:
        kill_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(environment, "labelled", "broken")
    latest = checkpoint.load(fold(environment) / LATEST)
    assert latest["nnssl_ext"]["step"] == 6
    assert len(latest["logging"]["ema_fg_dice"]) == 2
    assert latest["_best_ema"] == max(latest["logging"]["ema_fg_dice"])


def test_killed_at_once_it_goes_on_from_the_pretrained_weights(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("labelled")
    plans(environment, "scratch", "whole", "broken")
    scratch = final(tune(environment, "labelled", "scratch"))["network_weights"]
    source = environment.root / "source.pth"
    torch.save({"network_weights": {k: v + 0.01 for k, v in scratch.items()}}, source)
    whole = tune(environment, "labelled", "whole", source)
    with monkeypatch.context() as patch:
        kill_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(environment, "labelled", "broken", source)
    same_run(whole, tune(environment, "labelled", "broken", c=True))


def test_the_newest_checkpoint_is_never_older_than_the_best(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are due every 50 epochs; the first epoch is the best so far."""
    environment = with_data("labelled")
    plans(environment, "whole", "broken", save_every=50)
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(environment, "labelled", "broken")
    assert checkpoint.load(fold(environment) / LATEST)["nnssl_ext"]["step"] == 3
    same_run(tune(environment, "labelled", "whole"), tune(environment, "labelled", "broken", c=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_replaced_and_no_batch_is_lost(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    environment = with_data("labelled")
    plans(environment, "whole", "broken")
    whole = tune(environment, "labelled", "whole")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    def lose_a_worker() -> None:
        time.sleep(0.5)  # its next batches wait to be fetched
        # the newest: another test's loader may not be collected yet, and that of the validation starts later
        training = max(multiprocessing.active_children(), key=lambda child: child._identity)
        os.kill(training.pid or 0, number)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "POLL_SECONDS", 2)
        patch.setattr(loader, "HANG_SECONDS", 4)
        at_step(1, patch, lose_a_worker, nnsslTrainer_Finetune)
        broken = tune(environment, "labelled", "broken")
    log = next(broken.glob("training_log_*.txt")).read_text()
    lost = (
        r"loader: worker (\d+|unknown) (was killed by signal 9|gave no batch).*; it is replaced, and no batch is lost"
    )
    assert re.search(lost, log)
    same_run(whole, broken)


@pytest.mark.real_commands
def test_a_signal_to_the_whole_group_through_the_command(with_data: Data) -> None:
    """As a cluster sends it: to the command and its workers; and once more SIGKILL."""
    environment = with_data("labelled")
    plans(environment, "broken", steps=2000, snapshots=[])
    variables = {**os.environ, **environment.variables, "PATH": commands_path(), "nnUNet_n_proc_DA": "1"}
    latest = fold(environment) / LATEST
    for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -9), (signal.SIGUSR1, 0)):
        before = latest.stat().st_mtime if latest.exists() else 0.0
        words = WORDS if number == signal.SIGTERM else [*WORDS, "--c"]
        process = subprocess.Popen(
            words,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            begin = time.monotonic()
            while not latest.exists() or latest.stat().st_mtime <= before:
                assert process.poll() is None
                assert time.monotonic() - begin < 600
                time.sleep(0.05)
            time.sleep(1)
        finally:
            os.killpg(process.pid, number)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == status, output
        if status == 0:
            assert f"Stopped by {number.name} after step " in output
            assert "Traceback" not in output
        checkpoint.load(latest)


def test_no_worker_is_forked_while_a_checkpoint_is_written(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, running = with_data("labelled"), list[bool]()
    plans(environment, "run", common={"write_in_background": True})
    save, load = checkpoint.save, loader.SteadyLoader.__iter__

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        save(*arguments)

    def batches(self: loader.SteadyLoader) -> Any:  # workers are forked at the first batch
        running.append("checkpoint" in [thread.name for thread in threading.enumerate()])
        yield from load(self)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(loader.SteadyLoader, "__iter__", batches)
    tune(environment, "labelled", "run")
    assert running == [False] * 4  # one training loader and three validations


def test_data_that_fails_in_a_validation_loses_no_step(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    plans(environment, "whole", "broken", save_every=50)
    with monkeypatch.context() as patch:
        kill_at(6, patch, error=UserError("a case is damaged"), method="validation_step")
        with pytest.raises(UserError, match="a case is damaged"):
            tune(environment, "labelled", "broken")
    assert checkpoint.load(fold(environment) / LATEST)["nnssl_ext"]["step"] == 6
    same_run(tune(environment, "labelled", "whole"), tune(environment, "labelled", "broken", c=True))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(("ending", "content"), [(".pkl", b""), (".b2nd", None)])
def test_a_case_that_cannot_be_read_is_named_and_nothing_is_lost(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, workers: str, ending: str, content: bytes | None
) -> None:
    """torch would give the next batch in the place of one whose files are missing."""
    environment = with_data("labelled")
    plans(environment, "whole", "broken", save_every=50)
    whole = tune(environment, "labelled", "whole")
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    name = next(iter(json.loads((environment.dataset("labelled") / "splits_final.json").read_text())[0]["train"]))
    file = cases(environment, "labelled") / f"{name}{ending}"
    sound = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"case '{name}' in .* cannot be read: .*Repair it or preprocess it again"):
        tune(environment, "labelled", "broken")
    assert time.monotonic() - begin < 20
    file.write_bytes(sound)
    same_run(whole, tune(environment, "labelled", "broken", c=True))
