"""Four processes (gloo, CPU) give the loss and the gradients of one with the same global batch."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.training.distributed import heartbeat
from nnssl_ext.training.distributed.ranks import mean_over_samples, rank_device
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from tests.conftest import Environment
from tests.support.processes import assert_equal_runs, free_port, one_rank, ranks
from tests.support.runs import pretrain

Data = Callable[[str], Environment]


def without_dropout(plans: dict) -> None:
    """Each process draws its own."""
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    if "heads" in arguments:
        arguments |= {"dropout": [0.0] * 5, "drop_path": 0.0}


# five samples over four processes are uneven; two over two, with batch norm on two kinds of network, is the rest
@pytest.mark.parametrize(
    ("method", "kind", "world", "batch_size"),
    [
        *((name, "plain", 4, 5) for name in METHODS),
        ("exemplar", "plain", 2, 4),
        ("volume_fusion", "pct_net", 2, 3),
    ],
)
def test_several_ranks_equal_one(with_data: Data, method: str, kind: str, world: int, batch_size: int) -> None:
    environment, trainer = with_data(kind), TRAINERS[method]
    # in bfloat16 the split of a batch is rounding
    settings = {
        "precision": "float32",
        "batch_size": batch_size,
        "epochs": 1,
        "iterations_per_epoch": 1 if kind == "pct_net" else 2,
    }
    settings |= {"validation_iterations": 1, "pretext_picture_every": 1, method: {"optimizer": "sgd"}}
    for plans in ("one", "several"):
        environment.write_plans(kind, plans, settings, without_dropout)
    one = pretrain(environment, kind, "one", trainer=trainer)
    assert ranks(world, one_rank, "several", trainer, False, kind) == [0] * world
    several = environment.fold(kind, "several", trainer)
    assert sorted(path.name for path in several.iterdir() if not path.name.startswith("training_log_")) == [
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "debug.json",
        "pretext.png",
        "progress.png",
    ]
    assert len(list(several.glob("training_log_*"))) == 1
    # torch's batch norm rounds more than ours; test_batch_norm.py compares gradients in float64
    assert_equal_runs(one, several, together=kind == "pct_net")


@pytest.mark.parametrize(("kind", "centering"), [("plain", "sinkhorn"), ("vit", "sinkhorn"), ("vit", "softmax")])
def test_3dino_over_ranks_with_either_centering_and_a_vision_transformer(
    with_data: Data, kind: str, centering: str
) -> None:
    environment, trainer = with_data(kind), TRAINERS["dino"]

    def as_if_trained(plans: dict) -> None:
        # the first features of a vision transformer are all alike: where KoLeo spreads them to is rounding
        if kind == "vit":
            arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
            arguments |= {"layer_scale": 1.0, "drop_path": 0.0}

    dino = {"optimizer": "sgd", "centering": centering, "teacher_temperature": [0.04, 0.04]}
    settings = {"precision": "float32", "batch_size": 3, "epochs": 1, "iterations_per_epoch": 2, "dino": dino}
    for plans in ("one", "two"):
        environment.write_plans(kind, plans, settings, as_if_trained)
    one = pretrain(environment, kind, "one", trainer=trainer)
    assert ranks(2, one_rank, "two", trainer, False, kind) == [0, 0]
    assert_equal_runs(one, environment.fold(kind, "two", trainer))


def test_mean_counts_samples_not_steps() -> None:
    outputs = [{"loss": torch.tensor([1.0, 2.0, 3.0])}, {"loss": torch.tensor([10.0])}]
    assert mean_over_samples(outputs) == {"loss": 4.0}


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rank_device(torch.device("cuda")) == torch.device("cuda", 3)


def rank_that_dies(rank: int, world: int, port: int, victim: int, number: int) -> None:
    original = PretrainingTrainer.train_step

    def train_step(self: PretrainingTrainer, batch: object) -> dict:
        if rank == victim and self.step == 5:  # the first checkpoint is whole, the second being written
            os.kill(os.getpid(), number)
        return original(self, batch)  # type: ignore[arg-type]

    PretrainingTrainer.train_step = train_step  # type: ignore[method-assign]
    heartbeat.BEAT_SECONDS, heartbeat.SILENCE_SECONDS = 0.2, 5.0
    sys.stderr = (Path(os.environ["nnUNet_results"]) / f"stderr_{rank}").open("w", buffering=1)
    one_rank(rank, world, port, "two", TRAINERS["volume_fusion"], c=True)


def two_ranks(victim: int, number: int) -> list[int | None]:
    """Exit codes of two processes of which one gets a signal amid the run; a stopped one is killed in the end."""
    context, port = mp.get_context("fork"), free_port()
    processes = [context.Process(target=rank_that_dies, args=(rank, 2, port, victim, number)) for rank in range(2)]
    for process in processes:
        process.start()
    for rank in (0, 1) if victim == 1 else (1, 0):
        processes[rank].join(240 if rank != victim or number == signal.SIGTERM else 0.1)
        if processes[rank].is_alive():
            processes[rank].kill()
            processes[rank].join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)])
def test_when_a_rank_is_gone_the_others_name_it_and_end(with_data: Data, victim: int, number: int) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "two", {"precision": "float32", "epochs": 8, "iterations_per_epoch": 2})
    codes = two_ranks(victim, number)
    assert codes[1 - victim] == 1
    line = (environment.results / f"stderr_{1 - victim}").read_text().strip().splitlines()[-1]
    assert line.startswith(f"nnssl_ext: error: process {victim} of 2 (pid ")
    assert f"is gone; process {1 - victim} ends too. The last checkpoint is intact: go on with --c" in line
    fold = environment.fold("plain", "two", TRAINERS["volume_fusion"])
    checkpoint.load(fold / "checkpoint_latest.pth")
    assert (pretrain(environment, "plain", "two", c=True) / "checkpoint_final.pth").is_file()


def test_a_signal_to_one_rank_ends_all_and_loses_nothing(with_data: Data) -> None:
    environment, trainer = with_data("plain"), TRAINERS["volume_fusion"]
    settings = {"precision": "float32", "epochs": 2, "iterations_per_epoch": 11, "volume_fusion": {"optimizer": "sgd"}}
    for plans in ("one", "two"):
        environment.write_plans("plain", plans, settings)
    assert two_ranks(1, signal.SIGTERM) == [0, 0]
    fold = environment.fold("plain", "two", trainer)
    assert checkpoint.load(fold / "checkpoint_latest.pth")["nnssl_ext"]["counters"]["step"] == 8
    log = next(fold.glob("training_log_*")).read_text()
    assert "Stopped by another process's signal after step 8 of 22; nothing is lost" in log
    assert two_ranks(-1, signal.SIGTERM) == [0, 0]
    one, two = (
        checkpoint.load(found / "checkpoint_final.pth") for found in (pretrain(environment, "plain", "one"), fold)
    )
    for key in ("train_losses", "val_losses"):
        assert two["logging"][key] == pytest.approx(one["logging"][key], rel=1e-4, abs=1e-6)
