"""Pretraining runs through stock nnU-Net's code path, their faults, and their comparison."""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.run.run_training import get_trainer_from_args, run_training

from nnssl_ext import checkpoint
from nnssl_ext.data.crops import CropDataset, Sample
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from nnssl_ext.training.run.folder import RunFolder
from tests.conftest import Environment
from tests.datasets import blob, dataset_name

CPU = torch.device("cpu")
TRAINER = "nnsslTrainer_VolumeFusion"
Data = Callable[[str], Environment]


def pretrain(
    environment: Environment,
    kind: str,
    plans: str,
    fold: str = "0",
    configuration: str = "3d_fullres",
    trainer: str = TRAINER,
    weights: Path | None = None,
    **options: bool,
) -> Path:
    """What the stock command does after parsing its arguments; returns the fold's folder."""
    run_training(
        dataset_name(kind),
        configuration,
        fold,
        trainer,
        plans,
        str(weights) if weights else None,
        device=CPU,
        continue_training=options.get("c", False),
        only_run_validation=options.get("val", False),
        disable_checkpointing=options.get("disable_checkpointing", False),
        val_with_best=options.get("val_best", False),
    )
    return environment.fold(kind, plans, trainer, configuration, fold)


def trainer_for(kind: str, plans: str, trainer: str = TRAINER, fold: int | str = 0) -> PretrainingTrainer:
    return get_trainer_from_args(dataset_name(kind), "3d_fullres", fold, trainer, plans, device=CPU)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def at_step(
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], object],
    trainer: type = PretrainingTrainer,
    method: str = "train_step",
) -> None:
    """The action comes before the trainer's method in the step with this number."""
    original = getattr(trainer, method)

    def acting(self: Any, batch: object) -> dict:
        if self.step == step:
            action()
        return original(self, batch)

    monkeypatch.setattr(trainer, method, acting)


def kill_at(
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | type[BaseException] = Killed,
    **where: Any,
) -> None:
    """The step with this number raises ``error`` instead."""

    def kill() -> None:
        raise error

    at_step(step, monkeypatch, kill, **where)


def signal_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int, **where: Any) -> None:
    """The signal comes while this step is computed."""
    at_step(step, monkeypatch, lambda: os.kill(os.getpid(), number), **where)


def same_run(first: Path, second: Path) -> None:
    """Weights, optimiser and objective values are equal bit for bit."""
    one, other = (checkpoint.load(fold / "checkpoint_final.pth") for fold in (first, second))
    assert one["nnssl_ext"]["weights_sha256"] == other["nnssl_ext"]["weights_sha256"]
    assert one["nnssl_ext"]["counters"] == other["nnssl_ext"]["counters"]
    for key, values in one["logging"].items():
        assert key.endswith("timestamps") or values == other["logging"][key], key
    digests = []
    for content in (one, other):
        content["nnssl_ext"] = {"state": content["nnssl_ext"]["state"]}
        digests.append(checkpoint.content_digest({k: content[k] for k in ("nnssl_ext", "optimizer_state")}))
    assert digests[0] == digests[1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def hold(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    with RunFolder(folder, print).locked():
        ready.set()
        os.kill(os.getpid(), 19)  # SIGSTOP


def no_checkpoint_fits(environment: Environment, words: list[str], size: int, folder: Path) -> None:
    """Run a command where no file may have more than ``size`` bytes; it says so and leaves nothing half-written."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        ended = environment.run(*words, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("nnssl_ext: error: checkpoint ")
    assert "could not be written" in line
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name]


def cases(environment: Environment, kind: str = "plain") -> Path:
    return environment.dataset(kind) / "nnUNetPlans_3d_fullres"


def replace_case(environment: Environment, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = cases(environment) / "case_03.b2nd"
    data = np.asarray(blosc2.open(str(path))[:])
    path.unlink()
    blosc2.asarray(np.ascontiguousarray(change(data)), urlpath=str(path), mode="w")


def fault(
    monkeypatch: pytest.MonkeyPatch, flag: Path, sample: int, number: int, once: bool = True, after: float = 0
) -> None:
    """The worker that reads this sample gets a signal, ``after`` so many seconds."""
    original = CropDataset.__getitem__

    def getitem(self: CropDataset, index: int) -> Sample:
        if index == sample and not (once and flag.exists()):
            time.sleep(after)
            flag.touch()
            os.kill(os.getpid(), number)
        return original(self, index)

    monkeypatch.setattr(CropDataset, "__getitem__", getitem)


STOCK = "nnUNet_Primus_S_Trainer"


def write_raw(environment: Environment, name: str) -> None:
    """An ordinary raw data set of seven small cases."""
    folder = environment.root / "raw" / name
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for case in range(7):
        image = blob(np.random.default_rng(case), (24, 28, 26))
        part = "imagesTs" if case == 6 else "imagesTr"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), str(folder / part / f"c{case}_0000.nii.gz"))
        if case < 6:
            label = SimpleITK.GetImageFromArray((image > np.median(image) + 1).astype(np.uint8))
            SimpleITK.WriteImage(label, str(folder / "labelsTr" / f"c{case}.nii.gz"))
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
