"""``torchrun ... -m nnssl_ext.train``: one and several machines, errors said once, other numbers of processes."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_ext import checkpoint
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.errors import UserError
from nnssl_ext.methods import TRAINERS
from nnssl_ext.train import _check_devices, stock_parser, train
from nnssl_ext.training import checks as preflight
from nnssl_ext.training.distributed import heartbeat, launch
from nnssl_ext.training.distributed.launch import Place, _take_device
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from nnssl_ext.training.run import folder as run_folder
from tests.conftest import Environment
from tests.support.processes import assert_equal_runs, free_port, ranks
from tests.support.runs import pretrain

Data = Callable[[str], Environment]
TRAINER = TRAINERS["volume_fusion"]
#: Eleven steps an epoch; processes ask each other at every eighth whether to stop.
SETTINGS = {
    "precision": "float32",
    "batch_size": 5,
    "epochs": 2,
    "seed": 1,
    "iterations_per_epoch": 11,
    "volume_fusion": {"optimizer": "sgd"},
}


def words(plans: str, *more: str, trainer: str = TRAINER) -> list[str]:
    return ["811", "3d_fullres", "0", "-tr", trainer, "-p", plans, "-device", "cpu", *more]


def launched(rank: int, world: int, port: int, folder: Path, arguments: Sequence[str], change: dict[str, str]) -> None:
    """What torchrun starts, in a process of this test; its lines on stderr go to ``folder``."""
    torch.set_num_threads(1)
    sys.stderr = (folder / f"stderr_{rank}").open("w", buffering=1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "nnUNet_extTrainer": "", **change}
    heartbeat.BEAT_SECONDS = 0.2
    train(arguments)


def lines(folder: Path) -> list[str]:
    """What all processes said on stderr, progress bars aside."""
    said = [(file, line) for file in sorted(folder.glob("stderr_*")) for line in file.read_text().splitlines()]
    return [line for _, line in said if "error" in line.lower() or "Traceback" in line]


def test_a_run_goes_on_with_any_number_of_processes_and_machines(with_data: Data) -> None:
    environment = with_data("plain")
    for plans in ("whole", "parts"):
        environment.write_plans("plain", plans, SETTINGS)
    fold = environment.fold("plain", "parts", TRAINER)

    # torchrun with two processes, which stops after eight steps
    single = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "nnssl_ext.train"]
    first = environment.run(*single, *words("parts", "--max-time", "0.00001"), variables={"nnUNet_extTrainer": ""})
    assert step_of(fold) == 8
    log = next(fold.glob("training_log_*")).read_text()
    assert "torchrun --standalone --nnodes=1 --nproc-per-node=2 -m nnssl_ext.train 811 3d_fullres 0 -p parts" in log
    assert "I am local rank 1" in first.stdout

    # four processes, up to step 16
    four = [words("parts", "--c", "--max-time", "0.00001"), {}]
    assert ranks(4, launched, environment.root, *four) == [0] * 4
    assert step_of(fold) == 16
    shutil.copytree(fold, environment.root / "at_16")

    # one process to the end
    whole = pretrain(environment, "plain", "whole")
    assert_equal_runs(whole, pretrain(environment, "plain", "parts", c=True), tolerance=1e-2)

    # two machines to the end
    shutil.rmtree(fold)
    shutil.copytree(environment.root / "at_16", fold)
    agents = two_machines(environment, words("parts", "--c"))
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(agent.stderr for agent in agents)
    assert_equal_runs(whole, fold, tolerance=1e-2)
    assert [agent.stdout.count("Pretraining summary") for agent in agents] == [1, 0]
    names = {path.name.partition("_2")[0] for path in fold.iterdir()}
    assert names == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "debug.json",
        "pretraining_summary.json",
        "progress.png",
        "training_log",
    }


def two_machines(environment: Environment, arguments: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Two torchrun agents with one process each, as two machines have them."""
    port, finished = free_port(), {}
    places = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]

    def machine(number: int) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        finished[number] = subprocess.run(
            ["torchrun", *places, f"--node-rank={number}", "-m", "nnssl_ext.train", *arguments],
            env={**os.environ, **environment.variables, "PATH": path},
            text=True,
            timeout=600,
            capture_output=True,
            cwd=environment.root,
        )

    threads = [threading.Thread(target=machine, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # which of them is the first is decided where they meet
    return sorted(finished.values(), key=lambda agent: "Pretraining summary" not in agent.stdout)


def step_of(fold: Path) -> int:
    return checkpoint.load(fold / "checkpoint_latest.pth")["nnssl_ext"]["counters"]["step"]


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["-num_gpus", "2"], {}, "-num_gpus 2 needs -device cuda, got cpu"),
        (["-tr", "nnsslTrainer_VolumeFuison"], {}, "Did you mean 'nnsslTrainer_VolumeFusion'"),
        (["-tr", "nnUNetTrainer"], {}, "trainer 'nnUNetTrainer' takes GPUs only where there are several processes"),
        (
            ["-tr", "nnUNetTrainer", "-device", "cuda"],
            {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "no CUDA device was found. Use -device cpu",
        ),
        (["-device", "cuda"], {"CUDA_VISIBLE_DEVICES": ""}, "no CUDA device was found. Use -device cpu"),
        (["-device", "mps"], {}, "no MPS device was found"),
        (["--resume"], {}, "unrecognized arguments: --resume"),
        (["--c", "--val"], {}, "--c and --val exclude each other"),
        (["-p", "one_sample"], {}, "batch size 1 is smaller than the number of GPUs (2)"),
        (["--max-time", "soon"], {}, "--max-time (or nnssl_ext_max_time) must be a positive number of hours"),
    ],
)
def test_bad_input_is_said_once_and_ends_all(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, arguments: list[str], change: dict[str, str], message: str
) -> None:
    environment = with_data("plain")
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 30.0)  # a busy machine
    environment.write_plans("plain", "quick", {"batch_size": 3})
    environment.write_plans("plain", "one_sample", {"batch_size": 1})
    assert ranks(2, launched, environment.root, [*words("quick"), *arguments], change) == [1, 1]
    said = lines(environment.root)
    assert len(said) == 1, said
    assert message in said[0]
    assert said[0].startswith("nnssl_ext: error: ")
    assert not list(environment.results.iterdir())


def only_in(victim: int, place: str) -> Callable[..., None]:
    """``launched``, with an error at ``place`` that one process alone meets."""

    def process(rank: int, *arguments: object) -> None:
        if rank == victim:
            {"check": no_space, "lock": no_lock, "step": no_step, "defect": defect}[place]()
        launched(rank, *arguments)  # type: ignore[arg-type]

    return process


def fail(*_: object, **__: object) -> None:
    raise UserError("something is wrong here; mend it")


def no_space() -> None:
    preflight._training_cases = fail  # type: ignore[assignment]


def no_lock() -> None:
    run_folder.RunFolder.set_aside = fail  # type: ignore[method-assign]


def no_step() -> None:
    original = PretrainingTrainer.train_step
    PretrainingTrainer.train_step = lambda self, batch: fail() if self.step == 2 else original(self, batch)  # type: ignore[assignment, method-assign, return-value]


def defect() -> None:
    def divide(self: PretrainingTrainer, batch: object) -> dict:
        return {"loss": 1 // self.step}

    PretrainingTrainer.train_step = divide  # type: ignore[method-assign]


@pytest.mark.parametrize(("victim", "place"), [(1, "check"), (0, "lock"), (1, "step"), (0, "step"), (1, "defect")])
def test_an_error_of_one_process_ends_all(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, victim: int, place: str
) -> None:
    environment = with_data("plain")
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 1.0)
    environment.write_plans("plain", "quick", {"batch_size": 3})
    assert ranks(2, only_in(victim, place), environment.root, words("quick"), {}) == [1, 1]
    said = lines(environment.root)
    assert len(said) == (2 if place == "defect" else 1), said
    if place == "defect":
        assert [line.removeprefix("[rank1]: ").partition(":")[0] for line in said] == [
            "Traceback (most recent call last)",
            "ZeroDivisionError",
        ]
    else:
        assert said[0].startswith("nnssl_ext: error: something is wrong here; mend it")
        assert ("[process 1 of 2, pid " in said[0]) == (victim == 1)
    if place == "check":
        assert not list(environment.results.iterdir())


def nonfinite_from_the_third_step(rank: int, *arguments: object) -> None:
    original = PretrainingTrainer._terms

    def terms(self: PretrainingTrainer, batch: CropBatch, stream: int) -> dict:
        found = original(self, batch, stream)
        return {**found, "loss": found["loss"] * torch.nan} if self.step >= 2 and rank == 1 else found

    PretrainingTrainer._terms = terms  # type: ignore[method-assign]
    if rank == 0:  # the others wait for it
        save = checkpoint.save

        def slowly(*args: Any) -> None:
            time.sleep(4)
            save(*args)

        checkpoint.save = slowly  # type: ignore[assignment]
    launched(rank, *arguments)  # type: ignore[arg-type]


def test_too_many_bad_batches_end_all_with_a_checkpoint(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 1.0)
    environment.write_plans("plain", "quick", {"batch_size": 3, "epochs": 9, "max_nonfinite_batches": 1})
    assert ranks(2, nonfinite_from_the_third_step, environment.root, words("quick"), {}) == [1, 1]
    (line,) = lines(environment.root)
    assert "not finite in 2 batches, more than nnssl_ext.max_nonfinite_batches=1 allows" in line
    kept = checkpoint.load(environment.fold("plain", "quick", TRAINER) / "checkpoint_latest.pth")
    assert kept["nnssl_ext"]["counters"] == {"step": 4, "samples": 12, "nonfinite": 2}
    assert all(torch.isfinite(tensor).all() for tensor in kept["network_weights"].values())


def test_a_folder_in_use_ends_all(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"batch_size": 3})
    fold = environment.fold("plain", "quick", TRAINER)
    fold.mkdir(parents=True)
    with FileLock(fold / run_folder.LOCK):
        assert ranks(2, launched, environment.root, words("quick"), {}) == [1, 1]
    said = lines(environment.root)
    assert len(said) == 1
    assert "belongs to another run" in said[0]


def test_results_that_are_not_shared_are_refused(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"batch_size": 3})
    fold = environment.fold("plain", "quick", TRAINER)
    assert ranks(1, launched, environment.root, words("quick", "--max-time", "0.00001"), {}) == [0]
    before = (fold / "checkpoint_latest.pth").read_bytes()

    assert ranks(2, elsewhere, environment.root, words("quick", "--c"), {}) == [1, 1]
    said = lines(environment.root)
    assert len(said) == 1
    assert "find different checkpoints of fold 0" in said[0]
    assert "must be a folder that all machines share" in said[0]
    assert (fold / "checkpoint_latest.pth").read_bytes() == before


def elsewhere(rank: int, *arguments: object) -> None:
    if rank:
        os.environ["nnUNet_results"] = str(Path(os.environ["nnUNet_results"]).parent / "elsewhere")
    launched(rank, *arguments)  # type: ignore[arg-type]


def test_sigusr1_to_one_process_ends_all_with_a_checkpoint(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {**SETTINGS, "batch_size": 3})
    assert ranks(2, signalled, environment.root, words("quick"), {}) == [0, 0]
    assert step_of(environment.fold("plain", "quick", TRAINER)) == 8


def signalled(rank: int, *arguments: object) -> None:
    original = PretrainingTrainer.train_step

    def train_step(self: PretrainingTrainer, batch: object) -> dict:
        if rank == 1 and self.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batch)  # type: ignore[arg-type]

    PretrainingTrainer.train_step = train_step  # type: ignore[method-assign]
    launched(rank, *arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not. Start the processes with torchrun"),
        ({"LOCAL_RANK": "a", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "LOCAL_RANK must be a number, got 'a'"),
    ],
)
def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Place.of_this_process()


def test_several_gpus_need_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for Windows has none."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one, two = (stock_parser().parse_args(["4", "3d_fullres", "0", "-num_gpus", number]) for number in "12")
    _check_devices(one)
    for check in (lambda: _check_devices(two), lambda: _take_device("cuda", Place(0, 2, 0, 2))):
        with pytest.raises(UserError, match=r"several GPUs need NCCL, which this torch lacks \(Windows\); use one GPU"):
            check()


def test_arguments_are_those_of_nnunet(environment: Environment) -> None:
    theirs = environment.run("nnUNetv2_train", "--help").stdout
    ours = {option for action in stock_parser()._actions for option in action.option_strings}
    listed = {word.strip(",") for line in theirs.split("options:")[1].splitlines() for word in line.split()[:1]}
    assert ours == {word for word in listed if word.startswith("-")} - {"-h", "--help"}


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        ({"num_gpus": 2}, Place(0, 2, 0, 2), "starts processes of its own, and torchrun has started 2"),
        ({"pretrained_weights": "x.pth", "device": "cpu"}, Place(0, 2, 0, 2), "needs GPUs of one machine here"),
        ({"pretrained_weights": "x.pth"}, Place(2, 4, 0, 2), "needs GPUs of one machine here"),
        ({"tr": "nnUNetTrainer"}, Place(2, 4, 0, 2), "runs on one machine only .* all 4 processes"),
    ],
)
def test_places_that_do_not_work(
    monkeypatch: pytest.MonkeyPatch, words: dict[str, object], place: Place, message: str
) -> None:
    known = {TRAINER: PretrainingTrainer, "nnUNetTrainer": nnUNetTrainer}
    monkeypatch.setattr(launch, "recursive_find_trainer_class_by_name", known.__getitem__)
    usual = {"num_gpus": None, "tr": TRAINER, "device": "cuda", "pretrained_weights": None}
    with pytest.raises(UserError, match=message):
        launch._check_place(place, Namespace(**{**usual, **words}))
    launch._check_place(Place(1, 2, 1, 2), Namespace(**{**usual, "pretrained_weights": "x.pth"}))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on a machine where each sees 1 GPUs"):
        _take_device("cuda", Place(1, 2, 1, 2))
