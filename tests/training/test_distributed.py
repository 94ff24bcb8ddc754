"""Two processes (gloo, CPU) give the loss and the gradients of one with the same global batch."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS
from nnssl_ext.training import heartbeat
from nnssl_ext.training.distributed import mean_over_samples, rank_device
from nnssl_ext.training.trainer import PretrainingTrainer
from tests.conftest import Environment
from tests.training.test_trainer import pretrain, trainer_for

Data = Callable[[str], Environment]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_rank(rank: int, world: int, port: int, plans: str, trainer_name: str, c: bool = False) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trainer = trainer_for("plain", plans, trainer_name)
    maybe_load_checkpoint(trainer, c, False)
    trainer.run_training()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "batch_size"), [*((name, 3) for name in METHODS), ("volume_fusion", 4), ("exemplar", 4)]
)
def test_two_ranks_equal_one(with_data: Data, method: str, batch_size: int) -> None:
    environment, trainer = with_data("plain"), METHODS[method].trainer
    # in bfloat16 the split of a batch is rounding
    settings = {"precision": "float32", "batch_size": batch_size, "iterations_per_epoch": 2}
    settings |= {method: {"optimiser": "sgd"}}
    environment.write_plans("plain", "one", settings)
    environment.write_plans("plain", "two", settings)
    one = checkpoint.load(pretrain(environment, "plain", "one", trainer=trainer) / "checkpoint_final.pth")
    mp.spawn(one_rank, args=(2, free_port(), "two", trainer), nprocs=2)
    two = checkpoint.load(environment.fold("plain", "two", trainer) / "checkpoint_final.pth")
    assert len(list(environment.fold("plain", "two", trainer).glob("training_log_*"))) == 1
    terms = [key for key in one["logging"] if key.startswith(("train_", "val_"))]
    assert f"val_{METHODS[method].readable.key}" in terms
    for key in terms:
        assert two["logging"][key] == pytest.approx(one["logging"][key], rel=1e-4, abs=1e-6), key
    # momentum buffers are sums of gradients
    for a, b in zip(one["optimizer_state"]["state"].values(), two["optimizer_state"]["state"].values(), strict=True):
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"], rtol=1e-3, atol=1e-5)


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
    heartbeat.BEAT_SECONDS, heartbeat.SILENCE_SECONDS = 0.2, 3.0
    sys.stderr = (Path(os.environ["nnUNet_results"]) / f"stderr_{rank}").open("w", buffering=1)
    one_rank(rank, world, port, "two", METHODS["volume_fusion"].trainer, c=True)


def two_ranks(victim: int, number: int) -> list[int | None]:
    """Exit codes of two processes of which one gets a signal amid the run; a stopped one is killed in the end."""
    context, port = mp.get_context("fork"), free_port()
    processes = [context.Process(target=rank_that_dies, args=(rank, 2, port, victim, number)) for rank in range(2)]
    for process in processes:
        process.start()
    for rank in (0, 1) if victim == 1 else (1, 0):
        processes[rank].join(90 if rank != victim or number == signal.SIGTERM else 0.1)
        if processes[rank].is_alive():
            processes[rank].kill()
            processes[rank].join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_when_a_rank_is_gone_the_others_name_it_and_end(with_data: Data, victim: int, number: int) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "two", {"precision": "float32", "epochs": 8, "iterations_per_epoch": 2})
    codes = two_ranks(victim, number)
    assert codes[1 - victim] == 1
    line = (environment.results / f"stderr_{1 - victim}").read_text().strip().splitlines()[-1]
    assert line.startswith(f"nnssl_ext: error: process {victim} of 2 (pid ")
    assert f"is gone; process {1 - victim} ends too. The last checkpoint is intact: go on with --c" in line
    fold = environment.fold("plain", "two", METHODS["volume_fusion"].trainer)
    checkpoint.load(fold / "checkpoint_latest.pth")
    assert (pretrain(environment, "plain", "two", c=True) / "checkpoint_final.pth").is_file()


def test_a_signal_to_one_rank_ends_all_and_loses_nothing(with_data: Data) -> None:
    environment, trainer = with_data("plain"), METHODS["volume_fusion"].trainer
    settings = {"precision": "float32", "epochs": 2, "iterations_per_epoch": 11, "volume_fusion": {"optimiser": "sgd"}}
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
