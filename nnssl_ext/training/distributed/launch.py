"""Train under torchrun, on one or several machines.

The processes meet, check their input together, and share errors.

What trains is stock nnU-Net's own ``run_training`` with one device per process; stock's ``-num_gpus`` starts its
processes by itself and knows one machine only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.heartbeat import Heartbeat
from nnssl_ext.training.distributed.ranks import check_nccl
from nnssl_ext.training.distributed.store import meet
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer


@dataclass(frozen=True)
class Place:
    """Place of this process among the others.

    Attributes:
        rank, world: Among all processes.
        local: Among those of this machine, and so its GPU.
        here: How many processes this machine has.
    """

    rank: int
    world: int
    local: int
    here: int

    @classmethod
    def of_this_process(cls) -> Place:
        """Read the variables that torchrun sets. All must be there, as numbers."""
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"RANK and WORLD_SIZE are set, {', '.join(missing)} not. Start the processes with torchrun, or unset "
                f"RANK and WORLD_SIZE"
            )
        rank, world, local = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK")
        return cls(rank, world, local, _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world)

    @property
    def alone(self) -> bool:
        """Return whether all processes are on this machine."""
        return self.here == self.world and self.local == self.rank


@contextmanager
def process_group(check: Callable[[], argparse.Namespace]) -> Iterator[None]:
    """Open a process group.

    An error in one process ends all of them with status 1 and is reported once. ``check`` reads and checks the command
    line, in every process; nothing is written before all have.
    """
    place = Place.of_this_process()
    store = meet(place.rank, place.world)
    try:
        with Heartbeat(place.rank, place.world):
            options = check()
            _check_place(place, options)
            backend = _take_device(options.device, place)
            if place.rank:
                os.environ["nnUNet_wandb_enabled"] = "0"  # stock would begin one record per process
            # a lost process is found by its heartbeat; waiting for a slow disk or validation is no error
            day = timedelta(days=1)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=day)
            try:
                yield
            except SystemExit as error:
                if error.code in (None, 0):
                    dist.destroy_process_group()
                raise
            dist.destroy_process_group()
    except BaseException as error:
        _end_hard_on_gpus(error, place)
        raise


def _check_place(place: Place, options: argparse.Namespace) -> None:
    if options.num_gpus is not None:
        raise UserError(
            f"-num_gpus {options.num_gpus} starts processes of its own, and torchrun has started {place.world}. Give "
            f"one of the two"
        )
    trainer = recursive_find_trainer_class_by_name(options.tr)
    if issubclass(trainer, PretrainingTrainer):
        if options.pretrained_weights and (options.device != "cuda" or not place.alone):
            # stock loads them to the GPU of the process's number among all
            raise UserError(
                "-pretrained_weights needs GPUs of one machine here. Use nnssl_ext.start_from (nnssl_ext plan)"
            )
        return
    if options.device != "cuda":
        raise UserError(
            f"trainer '{options.tr}' takes GPUs only where there are several processes, got -device {options.device}. "
            f"Start it with nnUNetv2_train, or take one of the pretraining trainers"
        )
    if not place.alone:
        raise UserError(
            f"trainer '{options.tr}' runs on one machine only (it takes its number among all {place.world} processes "
            f"for its GPU's). Use torchrun --standalone or -num_gpus. The pretraining trainers run on several machines"
        )


def _take_device(device: str, place: Place) -> str:
    """Select this process's GPU and return the backend."""
    if device == "cpu":
        return "gloo"
    if device != "cuda":
        raise UserError(f"several processes need -device cuda or cpu, got {device}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        raise UserError("no CUDA device was found. Use -device cpu")
    if place.local >= found:
        raise UserError(
            f"{place.here} processes on a machine where each sees {found} GPUs. Give --nproc-per-node {found}, or let "
            f"each process see all GPUs of its machine"
        )
    check_nccl()
    torch.cuda.set_device(place.local)
    return "nccl"


def _end_hard_on_gpus(error: BaseException, place: Place) -> None:
    """End a failed process at once, if it uses NCCL. Python's clean-up could wait there for processes that are gone."""
    failed = not (isinstance(error, SystemExit) and error.code in (None, 0))
    if failed and place.world > 1 and dist.is_initialized() and dist.get_backend() == "nccl":
        sys.stderr.flush()
        os._exit(1)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise UserError(f"{name} must be a number, got '{text}'. Start the processes with torchrun")
    return int(text)
