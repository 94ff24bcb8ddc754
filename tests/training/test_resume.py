"""Killed and continued with --c equals never killed, bit for bit."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, TRAINERS
from tests.conftest import Environment
from tests.support.runs import TRAINER, Killed, kill_at, pretrain, same_run, trainer_for

Data = Callable[[str], Environment]
RUN = {"epochs": 5, "iterations_per_epoch": 3, "save_every": 2}


def final(fold: Path) -> dict:
    return checkpoint.load(fold / "checkpoint_final.pth")


@pytest.mark.parametrize(
    ("method", "step"), [*((name, 8) for name in METHODS), ("volume_fusion", 4), ("volume_fusion", 14)]
)
def test_continued_equals_never_killed(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    """The continued run draws its pretext task in each epoch, the other one never."""
    environment, trainer = with_data("residual"), TRAINERS[method]
    environment.write_plans("residual", "whole", {**RUN, "pretext_picture_every": 0})
    environment.write_plans("residual", "broken", {**RUN, "pretext_picture_every": 1})
    without_picture = pretrain(environment, "residual", "whole", trainer=trainer)
    whole = final(without_picture)

    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            pretrain(environment, "residual", "broken", trainer=trainer)
    torch.manual_seed(12345)  # a new process starts with another state
    with_picture = pretrain(environment, "residual", "broken", trainer=trainer, c=True)
    broken = final(with_picture)

    assert (with_picture / "pretext.png").is_file()
    assert not (without_picture / "pretext.png").exists()
    assert "could not be drawn" not in "".join(log.read_text() for log in with_picture.glob("training_log_*"))
    assert broken["nnssl_ext"]["weights_sha256"] == whole["nnssl_ext"]["weights_sha256"]
    for key in ("train_losses", "val_losses", "lrs", f"val_{METHODS[method].readable.key}"):
        assert broken["logging"][key] == whole["logging"][key]
    for mine, other in zip(
        broken["optimizer_state"]["state"].values(), whole["optimizer_state"]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert broken["nnssl_ext"]["counters"] == whole["nnssl_ext"]["counters"]


def test_another_run_is_refused(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"save_every": 1})
    fold = pretrain(environment, "plain", "run")
    before = (fold / "checkpoint_final.pth").read_bytes()
    changes: list[tuple[dict, str]] = [
        ({"seed": 7}, "settings.seed is 0 there and 7 here"),
        ({"volume_fusion": {"levels": 2}}, "settings.volume_fusion.levels is 4 there and 2 here"),
        ({"batch_size": 3}, "batch_size is 2 there and 3 here"),
        ({"crop_size": [8, 16, 16]}, r"geometry.crop_size is \[16, 16, 16\] there and \[8, 16, 16\] here"),
    ]
    for settings, message in changes:
        environment.write_plans("plain", "run", settings)
        with pytest.raises(UserError, match=f"belongs to another run: {message}"):
            pretrain(environment, "plain", "run", c=True)

    def wider(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 8, 8]

    environment.write_plans("plain", "run", {}, wider)
    with pytest.raises(UserError, match="belongs to another run: architecture"):
        pretrain(environment, "plain", "run", c=True)
    assert (fold / "checkpoint_final.pth").read_bytes() == before


def test_more_epochs_may_be_asked_for(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})
    pretrain(environment, "plain", "run")
    environment.write_plans("plain", "run", {"epochs": 3})
    assert final(pretrain(environment, "plain", "run", c=True))["current_epoch"] == 3


def test_activations_may_be_recomputed_from_now_on(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lacked memory is told to do so. It changes no value."""
    environment = with_data("plain")
    for name in ("run", "whole"):
        environment.write_plans("plain", name, {"epochs": 2, "save_every": 1})
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Killed):
            pretrain(environment, "plain", "run")
    environment.write_plans("plain", "run", {"epochs": 2, "save_every": 1, "activation_checkpointing": True})
    same_run(pretrain(environment, "plain", "whole"), pretrain(environment, "plain", "run", c=True))


def test_a_longer_run_goes_on_from_its_own_checkpoints(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final checkpoint of the shorter one is an earlier one then."""
    environment = with_data("plain")
    for name in ("run", "whole"):
        environment.write_plans("plain", name, {"epochs": 1})
        fold = pretrain(environment, "plain", name)
        environment.write_plans("plain", name, {"epochs": 4})
    with monkeypatch.context() as patch:
        kill_at(8, patch)
        with pytest.raises(Killed):
            pretrain(environment, "plain", "run", c=True)
    fold = environment.fold("plain", "run", TRAINER)
    assert not (fold / "checkpoint_final.pth").exists()
    pretrain(environment, "plain", "run", c=True)
    assert max(fold.glob("training_log*")).read_text().count("\nEpoch ") == 0
    same_run(fold, pretrain(environment, "plain", "whole", c=True))


def test_without_a_checkpoint_stock_starts_anew(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})
    assert (pretrain(environment, "plain", "run", c=True) / "checkpoint_final.pth").is_file()
    assert environment.fold("plain", "run", TRAINER).is_dir()


def test_an_epoch_that_goes_on_keeps_its_time(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})
    trainer = trainer_for("plain", "run")
    trainer.seconds_before = 1000.0
    trainer.on_epoch_start()
    assert 1000 <= time.time() - trainer.logger.get_value("epoch_start_timestamps", -1) < 1100


def test_the_split_is_written_as_stock_does_and_as_a_whole(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    file = environment.dataset("plain") / "splits_final.json"
    file.unlink(missing_ok=True)
    trainer = trainer_for("plain", "nnUNetPlans", "nnsslTrainer_Finetune")
    trainer._write_split()
    ours = file.read_text()
    file.unlink()
    nnUNetTrainer.do_split(trainer)
    assert json.loads(file.read_text()) == json.loads(ours)
