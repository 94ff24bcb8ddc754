"""The folder of a fine-tuning: torn checkpoints, two runs, a full disk, lost permission; nothing is overwritten."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import run_training

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
from nnssl_ext.training.run.folder import LATEST, LOCK, RunFolder
from tests.conftest import Environment
from tests.datasets import dataset_name
from tests.support.finetunings import (
    BROKEN,
    NAME,
    WORDS,
    asked_to_end,
    fold,
    plans,
    same_run,
    signal_at,
    tune,
)
from tests.support.runs import hold, no_checkpoint_fits, truncate

Data = Callable[[str], Environment]
CPU, VALIDATION = torch.device("cpu"), nnsslTrainer_Finetune.perform_actual_validation
pytestmark = pytest.mark.usefixtures("training_only")


def flip_a_weight(file: Path) -> None:
    weights = checkpoint.load(file)["network_weights"]
    stored = max(weights.values(), key=torch.numel).numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_weight])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable
) -> None:
    environment = with_data("labelled")
    plans(environment, "whole", "broken")
    with monkeypatch.context() as patch:
        signal_at(6, patch, signal.SIGTERM)
        asked_to_end(environment)
    damage(fold(environment) / LATEST)
    broken = tune(environment, "labelled", "broken", c=True)
    output = capsys.readouterr().out
    assert "checkpoint_latest.pth is damaged" in output
    assert "checkpoint_previous.pth: the steps since then are done again" in output
    same_run(tune(environment, "labelled", "whole"), broken)


def test_starting_anew_keeps_what_was_there(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("labelled")
    plans(environment, "broken")
    before = {path.name: path.read_bytes() for path in tune(environment, "labelled", "broken").glob("*.pth")}
    assert "checkpoint_step_000002.pth" in before
    plans(environment, "broken", snapshots=[])
    tune(environment, "labelled", "broken")
    (kept,) = fold(environment).glob("earlier_*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert not list(fold(environment).glob("checkpoint_step*"))
    assert f"an earlier run are kept in {kept}" in capsys.readouterr().out


def test_a_second_run_in_the_folder_is_refused_and_a_stale_lock_taken_over(with_data: Data) -> None:
    environment = with_data("labelled")
    plans(environment, "broken")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(fold(environment), ready))
    holder.start()
    try:
        assert ready.wait(20)
        refused = environment.run(*WORDS, status=1)
        line = refused.stderr.strip().splitlines()[-1]
        assert line.startswith("nnssl_ext: error: ")
        assert f"belongs to another run, process {holder.pid} on " in line
    finally:
        holder.kill()
        holder.join()
    assert (fold(environment) / LOCK).exists()
    tune(environment, "labelled", "broken")
    assert not [path for path in fold(environment).iterdir() if path.name.startswith(".")]


def test_the_validation_has_the_folder_for_itself(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    plans(environment, "broken")
    tune(environment, "labelled", "broken")
    monkeypatch.setattr(nnsslTrainer_Finetune, "perform_actual_validation", VALIDATION)
    with (
        RunFolder(fold(environment), print).locked(),
        pytest.raises(UserError, match=f"belongs to another run, process {os.getpid()} on"),
    ):
        run_training(dataset_name("labelled"), "3d_fullres", 0, NAME, "broken", device=CPU, only_run_validation=True)
    assert not (fold(environment) / "validation").exists()


@pytest.mark.parametrize("setting", ["stop", "go_on"])
def test_a_lost_write_permission_amid_a_run(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("labelled")
    plans(environment, "whole")
    plans(environment, "broken", common={"on_write_failure": setting})
    original, count = tempfile.mkstemp, iter(range(100))

    def lost(*args: Any, **kwargs: Any) -> tuple[int, str]:
        if "latest" in str(kwargs.get("prefix")) and next(count) == 2:
            raise PermissionError(13, "Permission denied")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", lost)
        if setting == "stop":
            with pytest.raises(UserError, match=r"checkpoint .* could not be written .*Permission denied.*untouched"):
                tune(environment, "labelled", "broken")
            assert checkpoint.load(fold(environment) / LATEST)["nnssl_ext"]["step"] == 3
        else:
            tune(environment, "labelled", "broken")
            assert "Permission denied" in capsys.readouterr().out
    same_run(tune(environment, "labelled", "whole"), tune(environment, "labelled", "broken", c=True))


@pytest.mark.real_commands
def test_a_full_disk(with_data: Data) -> None:
    """The command, on a system that takes files up to a size only: the logs, but no checkpoint."""
    environment = with_data("labelled")
    plans(environment, "broken")
    no_checkpoint_fits(environment, list(WORDS), 20_000, fold(environment))


def test_another_network_is_refused(with_data: Data) -> None:
    environment = with_data("labelled")
    plans(environment, "broken")
    tune(environment, "labelled", "broken")

    def wider(content: dict) -> None:
        content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 8, 8]

    environment.write_plans("labelled", "broken", {"finetune": BROKEN}, wider)
    with pytest.raises(UserError, match="belongs to another network than the plans build"):
        tune(environment, "labelled", "broken", c=True)
