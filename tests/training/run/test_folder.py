"""The folder of a run: torn checkpoints, two runs in it, a full disk, lost permission; nothing is overwritten."""

import errno
import gc
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnssl_ext import checkpoint, files
from nnssl_ext.errors import UserError
from nnssl_ext.files import lock_file
from nnssl_ext.training.run import folder as run_folder
from nnssl_ext.training.run.folder import HOLDER, LOCK, RunFolder
from nnssl_ext.training.run.picture import ProgressPicture
from tests.conftest import Environment
from tests.support.runs import TRAINER, hold, no_checkpoint_fits, pretrain, same_run, signal_at, truncate

Data = Callable[[str], Environment]
RUN = {"epochs": 3, "iterations_per_epoch": 2, "save_every": 1}


@pytest.fixture(scope="module")
def _results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped") / "results"


@pytest.fixture
def stopped(with_data: Data, monkeypatch: pytest.MonkeyPatch, _results: Path) -> Environment:
    """A run that was asked to end in its third epoch, and its uninterrupted twin."""
    environment = with_data("plain")
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, RUN)
    if not _results.exists():
        pretrain(environment, "plain", "whole")
        with monkeypatch.context() as patch:
            signal_at(4, patch, 15)
            with pytest.raises(SystemExit):
                pretrain(environment, "plain", "broken")
        shutil.copytree(environment.results, _results)
    shutil.copytree(_results, environment.results, dirs_exist_ok=True)
    return environment


def fold(environment: Environment, plans: str = "broken") -> Path:
    return environment.fold("plain", plans, TRAINER)


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    begin = int(place * len(content))
    # more bytes than the gaps between tensors, which hold nothing
    content[begin : begin + 256] = bytes(byte ^ 1 for byte in content[begin : begin + 256])
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda file: file.write_bytes(b"")])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    stopped: Environment, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damage(fold(stopped) / "checkpoint_latest.pth")
    capsys.readouterr()
    pretrain(stopped, "plain", "broken", c=True)
    output = capsys.readouterr().out
    assert "checkpoint_latest.pth is damaged" in output
    assert "checkpoint_previous.pth: the steps since then are done again" in output
    same_run(fold(stopped, "whole"), fold(stopped))
    assert not list(fold(stopped).glob("checkpoint_[pl]*"))


def test_with_latest_gone_the_one_before_it_is_used(stopped: Environment) -> None:
    """Stock looks for final, latest and best only."""
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        (fold(stopped) / name).unlink()
    same_run(fold(stopped, "whole"), pretrain(stopped, "plain", "broken", c=True))


def test_with_none_valid_the_run_stops_and_everything_stays(stopped: Environment) -> None:
    files = sorted(fold(stopped).glob("*.pth"))
    assert [file.name for file in files] == [f"checkpoint_{name}.pth" for name in ("best", "latest", "previous")]
    for file in files:
        truncate(file)
    before = [file.read_bytes() for file in files]
    with pytest.raises(
        UserError, match="latest.pth is damaged.*previous.pth is.*best.pth is.*None can be read"
    ) as error:
        pretrain(stopped, "plain", "broken", c=True)
    assert "\n" not in str(error.value)
    assert [file.read_bytes() for file in files] == before


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "network_weights": {"a": torch.randn(40)},
        "optimizer_state": {"state": {0: {"exp_avg": torch.randn(40), "step": 3.0}}},
        "nnssl_ext": {"format": checkpoint.FORMAT, "state": {"centre": torch.randn(20)}},
    }
    file = tmp_path / "c.pth"
    checkpoint.save(content, file)
    good = file.read_bytes()
    for place in range(0, len(good), 7):
        file.write_bytes(good)
        flip(file, place / len(good))
        try:
            read = checkpoint.load(file)
        except UserError:
            continue
        # padding between the parts holds nothing
        state, kept = read["optimizer_state"]["state"][0], content["optimizer_state"]["state"][0]
        assert torch.equal(read["network_weights"]["a"], content["network_weights"]["a"]), place
        assert torch.equal(state["exp_avg"], kept["exp_avg"]), place
        assert state["step"] == 3.0, place
        assert torch.equal(read["nnssl_ext"]["state"]["centre"], content["nnssl_ext"]["state"]["centre"]), place


def test_starting_anew_keeps_what_was_there(stopped: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    before = (fold(stopped) / "checkpoint_latest.pth").read_bytes()
    capsys.readouterr()
    pretrain(stopped, "plain", "broken")
    (kept,) = fold(stopped).glob("earlier_*")
    assert (kept / "checkpoint_latest.pth").read_bytes() == before
    assert f"an earlier run are kept in {kept}: checkpoint_latest.pth" in capsys.readouterr().out


def test_a_second_run_in_the_folder_is_refused_and_a_stale_lock_taken_over(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "broken", {"epochs": 1})
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(fold(environment), ready))
    holder.start()
    try:
        assert ready.wait(20)
        words = ["nnUNetv2_train", "811", "3d_fullres", "0", "-tr", TRAINER, "-p", "broken", "-device", "cpu"]
        refused = environment.run(*words, status=1)
        line = refused.stderr.strip().splitlines()[-1]
        assert line.startswith("nnssl_ext: error: ")
        assert f"belongs to another run, process {holder.pid} on " in line
        assert "Traceback" not in refused.stderr
    finally:
        holder.kill()
        holder.join()
    assert (fold(environment) / LOCK).exists()
    assert json.loads((fold(environment) / HOLDER).read_text())["pid"] == holder.pid
    torn = fold(environment) / ".checkpoint_latest.pth.abc.tmp"
    torn.write_bytes(b"half")
    pretrain(environment, "plain", "broken")
    assert not [path for path in fold(environment).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("setting", ["stop", "go_on"])
def test_a_lost_write_permission_amid_a_run(
    stopped: Environment, monkeypatch: pytest.MonkeyPatch, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped.write_plans("plain", "other", {**RUN, "on_write_failure": setting})
    original, count = tempfile.mkstemp, iter(range(100))

    def lost(*args: object, **kwargs: object) -> tuple[int, str]:
        if "checkpoint" in str(kwargs.get("prefix")) and 2 <= next(count) < 4:
            raise PermissionError(13, "Permission denied")
        return original(*args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", lost)
        if setting == "stop":
            with pytest.raises(UserError, match=r"checkpoint .* could not be written .*Permission denied.*untouched"):
                pretrain(stopped, "plain", "other")
            checkpoint.load(fold(stopped, "other") / "checkpoint_latest.pth")
        else:
            pretrain(stopped, "plain", "other")
            assert "Permission denied" in capsys.readouterr().out
    same_run(fold(stopped, "whole"), pretrain(stopped, "plain", "other", c=True))


@pytest.mark.real_commands
def test_a_full_disk_amid_a_run(with_data: Data) -> None:
    """The command, on a system that takes files up to a size only: the logs, but no checkpoint."""
    environment = with_data("plain")
    environment.write_plans("plain", "broken", RUN)
    words = ["nnUNetv2_train", "811", "3d_fullres", "0", "-tr", TRAINER, "-p", "broken", "-device", "cpu"]
    no_checkpoint_fits(environment, words, 100_000, fold(environment))


@pytest.mark.draws
def test_no_picture_stays_in_memory(tmp_path: Path) -> None:
    """nnU-Net's, of every epoch: 60 MiB each until Python looks for cycles."""
    log = LocalLogger()
    for key in log.my_fantastic_logging:
        log.log(key, [0.5] if key.startswith("dice") else 1.0, 0)
    picture = ProgressPicture(lambda: log.plot_progress_png(str(tmp_path)), print)
    gc.collect()
    gc.disable()
    try:
        picture.update(last=True)
        assert [thing for thing in gc.get_objects() if isinstance(thing, Figure)] == []
    finally:
        gc.enable()
    assert (tmp_path / "progress.png").is_file()


@pytest.mark.parametrize(("seconds", "pictures"), [(3600.0, 1), (-1.0, 3)])
def test_short_epochs_share_a_picture_and_the_last_has_one(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, seconds: float, pictures: int
) -> None:
    environment, drawn = with_data("plain"), []
    environment.write_plans("plain", "run", {"epochs": 3, "iterations_per_epoch": 1, "validation_iterations": 1})
    monkeypatch.setattr("nnssl_ext.training.run.picture.DRAW_SECONDS", seconds)
    monkeypatch.setattr("nnssl_ext.training.run.picture.DRAW_SHARE", float("inf"))
    monkeypatch.setattr(
        "nnssl_ext.training.pretraining.log.PretrainingLog.plot_progress_png",
        lambda log, _: drawn.append(len(log.my_fantastic_logging["val_losses"])),
    )
    pretrain(environment, "plain", "run")
    assert len(drawn) == pictures
    assert drawn[-1] == 3


def test_pictures_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a picture takes seconds, and an epoch of a small network not much more."""
    clock, drawn = [0.0], []
    monkeypatch.setattr("nnssl_ext.training.run.picture.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def draw() -> None:
        drawn.append(clock[0])
        clock[0] += 3

    picture = ProgressPicture(draw, print)
    while clock[0] < 3600:
        clock[0] += 20  # an epoch
        picture.update(last=False)
    assert 3 * len(drawn) <= 0.021 * 3600, drawn
    assert len(drawn) > 20


def test_a_picture_that_cannot_be_written_ends_no_run(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnssl_ext.training.pretraining.log.PretrainingLog.plot_progress_png", full)
    log = next(pretrain(environment, "plain", "run").glob("training_log*")).read_text()
    assert "progress.png could not be written: No space left on device" in log
    assert run_folder.CHAIN[0] == "checkpoint_final.pth"


def written(folder: Path, *steps: tuple[str, int]) -> RunFolder:
    """Write checkpoints, each newer than the one before."""
    for age, (name, step) in enumerate(steps):
        content = {"network_weights": {"a": torch.zeros(2)}, "nnssl_ext": {"format": checkpoint.FORMAT, "step": step}}
        checkpoint.save(content, folder / name)
        os.utime(folder / name, (age, age))
    return RunFolder(folder, print)


@pytest.mark.parametrize("newer", ["checkpoint_previous.pth", "checkpoint_best.pth"])
def test_with_latest_gone_the_newer_of_previous_and_best_is_used(tmp_path: Path, newer: str) -> None:
    """Stock asks for the best one, since it does not know the previous one."""
    older = "checkpoint_best.pth" if newer == "checkpoint_previous.pth" else "checkpoint_previous.pth"
    folder = written(tmp_path, (older, 4), (newer, 9))
    content, source = folder.load_newest(tmp_path / "checkpoint_best.pth")
    assert (content["nnssl_ext"]["step"], source) == (9, str(tmp_path / newer))
    truncate(tmp_path / newer)
    content, source = folder.load_newest(tmp_path / "checkpoint_best.pth")
    assert (content["nnssl_ext"]["step"], source) == (4, str(tmp_path / older))


def test_the_best_is_loaded_where_it_is_asked_for_after_the_training(tmp_path: Path) -> None:
    names = ("checkpoint_best.pth", "checkpoint_previous.pth", "checkpoint_final.pth")
    folder = written(tmp_path, *((name, step) for step, name in enumerate(names)))
    assert folder.load_newest(tmp_path / "checkpoint_best.pth")[0]["nnssl_ext"]["step"] == 0


def test_weights_that_would_be_set_aside_are_no_start(tmp_path: Path) -> None:
    folder = written(tmp_path, ("checkpoint_final.pth", 9))
    (tmp_path / "link.pth").symlink_to(tmp_path / "checkpoint_final.pth")
    for source in ("checkpoint_final.pth", "link.pth", "."):
        with pytest.raises(UserError, match=r"expected weights of another run to start from, got .*Continue it with"):
            folder.set_aside(None, tmp_path / source)
    assert (tmp_path / "checkpoint_final.pth").is_file()
    (tmp_path / "elsewhere").mkdir()
    os.link(tmp_path / "checkpoint_final.pth", tmp_path / "elsewhere" / "checkpoint_final.pth")
    folder.set_aside(None, "owner/name", tmp_path / "elsewhere" / "checkpoint_final.pth")
    (earlier,) = tmp_path.glob("earlier_*")
    kept = earlier.rename(tmp_path / "earlier") / "checkpoint_final.pth"
    for name in ("validation", "validation_step_000004"):  # of a finished run, which the next one would seem to have
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").touch()
    written(tmp_path, ("checkpoint_final.pth", 9)).set_aside(kept)  # what was set aside before stays where it is
    assert kept.is_file()
    (second,) = tmp_path.glob("earlier_*")
    assert (second / "validation" / "summary.json").is_file()
    assert (second / "validation_step_000004" / "summary.json").is_file()
    assert not list(tmp_path.glob("validation*"))


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for error in (OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")):
        monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=error))
        with RunFolder(tmp_path, said.append).locked():
            assert (tmp_path / HOLDER).is_file()
        with lock_file(tmp_path / ".lock", "work"):
            pass
    assert len(said) == 2
    assert all("a second run in this folder would not be noticed" in line for line in said)
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match="cannot lock .*: Permission denied"), RunFolder(tmp_path, print).locked():
        pass
