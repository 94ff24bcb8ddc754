"""Two processes (gloo, CPU) give the loss and the gradients of one with the same global batch."""

import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS
from nnssl_ext.training.distributed import mean_over_samples, rank_device
from tests.conftest import Environment
from tests.training.test_trainer import pretrain, trainer_for

Data = Callable[[str], Environment]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_rank(rank: int, world: int, port: int, plans: str, trainer_name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trainer = trainer_for("plain", plans, trainer_name)
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
