"""Several processes on one machine."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS
from tests.support.runs import trainer_for


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_rank(
    rank: int, world: int, port: int, plans: str, trainer_name: str, c: bool = False, kind: str = "plain"
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trainer = trainer_for(kind, plans, trainer_name)
    maybe_load_checkpoint(trainer, c, False)
    trainer.run_training()
    dist.destroy_process_group()


def ranks(number: int, target: Callable[..., None], *arguments: object) -> list[int | None]:
    """Exit codes of ``target(rank, number, port, *arguments)`` in so many processes."""
    context, port = mp.get_context("fork"), free_port()
    processes = [context.Process(target=target, args=(rank, number, port, *arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def assert_equal_runs(one: Path, other: Path, *, together: bool = False, tolerance: float = 1e-4) -> None:
    """The same objectives and terms, and momentum buffers, which are sums of gradients.

    After many steps they need not be: a value that is zero but for rounding is on either side of a kink.
    ``tolerance`` is for each buffer. ``together`` compares them as one vector, and less strictly.
    """
    a, b = (checkpoint.load(fold / "checkpoint_final.pth") for fold in (one, other))
    terms = [key for key in a["logging"] if key.startswith(("train_", "val_"))]
    assert f"val_{METHODS[a['nnssl_ext']['method']].readable.key}" in terms
    for key in terms:
        assert b["logging"][key] == pytest.approx(a["logging"][key], rel=1e-4, abs=1e-6), key
    states = [content["optimizer_state"]["state"].values() for content in (a, b)]
    mine, theirs = ([state["momentum_buffer"].flatten() for state in part] for part in states)
    if together:
        mine, theirs, tolerance = [torch.cat(mine)], [torch.cat(theirs)], 5e-3
    for a_buffer, b_buffer in zip(mine, theirs, strict=True):
        # the gradient of a bias before a norm is rounding
        assert (a_buffer - b_buffer).norm() <= tolerance * a_buffer.norm() + 1e-6
