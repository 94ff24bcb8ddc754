"""Two processes (gloo, CPU) give the loss and the gradients of one with the same global batch."""

import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl_ext import checkpoint
from nnssl_ext.training.distributed import mean_over_samples, rank_device
from tests.conftest import Environment
from tests.training.test_trainer import TRAINER, pretrain, trainer_for

Data = Callable[[str], Environment]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_rank(rank: int, world: int, port: int, plans: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trainer = trainer_for("plain", plans)
    trainer.run_training()
    dist.destroy_process_group()


@pytest.mark.parametrize("batch_size", [4, 3])
def test_two_ranks_equal_one(with_data: Data, batch_size: int) -> None:
    environment = with_data("plain")
    settings = {
        "precision": "float32",
        "batch_size": batch_size,
        "iterations_per_epoch": 2,
        "volume_fusion": {"optimiser": "sgd"},
    }
    environment.write_plans("plain", "one", settings)
    environment.write_plans("plain", "two", settings)
    one = checkpoint.load(pretrain(environment, "plain", "one") / "checkpoint_final.pth")
    mp.spawn(one_rank, args=(2, free_port(), "two"), nprocs=2)
    two = checkpoint.load(environment.fold("plain", "two", TRAINER) / "checkpoint_final.pth")
    assert len(list(environment.fold("plain", "two", TRAINER).glob("training_log_*"))) == 1
    for key in ("train_losses", "val_losses", "val_fusion_dice"):
        assert two["logging"][key] == pytest.approx(one["logging"][key], rel=1e-4)
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
