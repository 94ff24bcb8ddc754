"""Checkpoints written while the training goes on: what they hold, when their failures show, and what waits for them."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from nnssl_ext.training.run.folder import FINAL, LATEST, PREVIOUS
from nnssl_ext.training.run.writer import CheckpointWriter
from tests.conftest import Environment
from tests.support.runs import pretrain, signal_at

Data = Callable[[str], Environment]


def state(value: float) -> dict[str, Any]:
    """A state dict that names its one tensor twice."""
    weights = torch.full((3, 2), value)
    return {
        "network_weights": {"a": weights, "alias": weights, "part": weights[:1]},
        "logging": {"losses": [value]},
        "nnssl_ext": {"format": checkpoint.FORMAT},
    }


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before the event is set."""
    event, original = threading.Event(), checkpoint.save

    def save(*args: Any) -> None:
        assert event.wait(20)
        original(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    return event


def test_what_changes_after_the_call_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, content = held_back(monkeypatch), state(1.0)
    writer = CheckpointWriter(True, False, print)
    writer.write(content, tmp_path / LATEST, tmp_path / "checkpoint_best.pth")
    content["network_weights"]["a"].fill_(2.0)  # as an optimiser does
    content["logging"]["losses"].append(2.0)
    assert not list(tmp_path.iterdir())
    go.set()
    assert writer.wait()
    for name in (LATEST, "checkpoint_best.pth"):
        read = checkpoint.load(tmp_path / name)
        assert sorted(read["network_weights"]) == ["a", "alias", "part"]
        assert all((tensor == 1).all() for tensor in read["network_weights"].values())
        assert read["logging"] == {"losses": [1.0]}
        assert read["network_weights"]["a"].data_ptr() == read["network_weights"]["alias"].data_ptr()


def test_one_write_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, running, most = checkpoint.save, [0], [0]

    def save(*args: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        original(*args)
        running[0] -= 1

    monkeypatch.setattr(checkpoint, "save", save)
    with CheckpointWriter(True, False, print) as writer:
        for value in range(4):
            writer.write(state(float(value)), tmp_path / LATEST)
    assert most == [1]
    assert checkpoint.load(tmp_path / LATEST)["logging"] == {"losses": [3.0]}
    assert checkpoint.load(tmp_path / PREVIOUS)["logging"] == {"losses": [2.0]}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def save(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_write_stops_or_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    told: list[str] = []
    failing(monkeypatch, UserError("no space"))
    with pytest.raises(UserError, match="no space"), CheckpointWriter(background, False, told.append) as writer:
        writer.write(state(1.0), tmp_path / LATEST)
    assert told == []

    writer = CheckpointWriter(background, True, told.append)
    writer.write(state(1.0), tmp_path / LATEST, tmp_path / "checkpoint_best.pth")
    assert writer.wait() is False
    assert told == ["WARNING: no space. Going on (on_write_failure=go_on)"] * 2
    with pytest.raises(UserError, match="no space"):
        writer.write(state(1.0), tmp_path / FINAL)

    failing(monkeypatch, MemoryError("ours"))
    with pytest.raises(MemoryError, match="ours"), CheckpointWriter(background, True, told.append) as writer:
        writer.write(state(1.0), tmp_path / LATEST)


def test_an_error_of_the_training_waits_for_the_write_and_is_the_one_that_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> None:
        with CheckpointWriter(True, False, told.append) as writer:
            writer.write(state(1.0), tmp_path / LATEST)
            threading.Timer(0.2, go.set).start()
            raise KeyError

    go, told = held_back(monkeypatch), list[str]()
    with pytest.raises(KeyError):
        trained()
    checkpoint.load(tmp_path / LATEST)
    assert told == []

    failing(monkeypatch, UserError("no space"))
    with pytest.raises(KeyError):
        trained()
    assert told == ["WARNING: no space"]


def _killed_amid_writing(folder: Path) -> None:
    writer = CheckpointWriter(True, False, print)
    for value in (1.0, 2.0):
        writer.write(state(value), folder / LATEST)
        writer.wait()
    original = torch.save

    def save(content: Any, file: Path) -> None:
        original(content, file)
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), 9)

    torch.save = save  # type: ignore[assignment]
    writer.write(state(3.0), folder / LATEST)
    writer.wait()


def test_sigkill_amid_a_write_leaves_the_one_before(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed_amid_writing, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert checkpoint.load(tmp_path / LATEST)["logging"] == {"losses": [2.0]}
    assert checkpoint.load(tmp_path / PREVIOUS)["logging"] == {"losses": [1.0]}
    assert len(list(tmp_path.iterdir())) == 3  # and half a temporary file


def digests(fold: Path) -> dict[str, str]:
    """Of the weights, method state, optimiser and counters in each checkpoint."""
    result = {}
    for file in sorted(fold.glob("checkpoint_*.pth")):
        content = checkpoint.load(file)
        kept = {key: content[key] for key in ("network_weights", "optimizer_state", "current_epoch")}
        own = {key: content["nnssl_ext"][key] for key in ("state", "counters", "outputs")}
        result[file.name] = checkpoint.content_digest({**kept, "nnssl_ext": own})
    return result


@pytest.mark.parametrize("name", ["volume_fusion", "dino", "contrastive_predictive_coding"])
def test_later_steps_do_not_leak_into_a_slow_write(with_data: Data, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each write begins when the training is two steps further; what it holds is what is written at once."""
    from nnssl_ext.methods import TRAINERS

    environment, trainer = with_data("plain"), TRAINERS[name]
    settings = {"epochs": 3, "iterations_per_epoch": 4, "save_every": 1}
    original, steps, ahead = checkpoint.save, [0], list[int]()
    train_step = PretrainingTrainer.train_step

    def step(self: PretrainingTrainer, batch: Any) -> dict:
        result = train_step(self, batch)
        steps[0] = self.step
        return result

    def slow(content: Any, path: Path, before: Any = None) -> None:
        begun = content["nnssl_ext"]["counters"]["step"]
        deadline = time.monotonic() + 60
        while threading.current_thread() is not threading.main_thread() and steps[0] < min(begun + 2, 12):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ahead.append(steps[0] - begun)
        original(content, path, before)
        (path.parent / "kept").mkdir(exist_ok=True)
        number = len(list((path.parent / "kept").iterdir()))
        os.link(path, path.parent / "kept" / f"checkpoint_{number}.pth")

    monkeypatch.setattr(PretrainingTrainer, "train_step", step)
    monkeypatch.setattr(checkpoint, "save", slow)
    found = {}
    for background in (True, False):
        environment.write_plans("plain", f"run{background}", {**settings, "write_in_background": background})
        fold = pretrain(environment, "plain", f"run{background}", trainer=trainer)
        found[background] = digests(fold / "kept")
        assert max(ahead) >= 2 if background else max(ahead) == 0
        ahead.clear()
    assert len(found[True]) >= 4
    assert found[True] == found[False]


def test_asked_to_end_amid_a_write_both_are_whole(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, original = with_data("plain"), checkpoint.save

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        original(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    environment.write_plans("plain", "run", {"epochs": 2, "iterations_per_epoch": 2, "save_every": 1})
    signal_at(2, monkeypatch, 15)
    with pytest.raises(SystemExit) as ended:
        pretrain(environment, "plain", "run")
    assert ended.value.code == 0
    fold = environment.fold("plain", "run", "nnsslTrainer_VolumeFusion")
    steps = [checkpoint.load(fold / name)["nnssl_ext"]["counters"]["step"] for name in (PREVIOUS, LATEST)]
    assert steps == [2, 3]
    assert not [path for path in fold.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_that_was_not_written_is_not_called_kept(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1, "on_write_failure": "go_on"})
    failing(monkeypatch, UserError("no space"))
    signal_at(0, monkeypatch, 15)
    with pytest.raises(SystemExit) as ended:
        pretrain(environment, "plain", "run")
    assert ended.value.code == 0
    assert "NO CHECKPOINT WAS WRITTEN" in capsys.readouterr().out
