"""One line, with what to change, for a run whose steps need more memory than there is."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import world
from nnssl_ext.training.memory.estimate import GIB, planned_memory

if TYPE_CHECKING:
    from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer

#: How torch's allocators on CPUs, the driver and libraries say it; they raise plain RuntimeErrors.
SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def told_when_out_of_memory(trainer: Any, described: Callable[[Any], str]) -> Iterator[None]:
    """Around a training: memory that does not suffice ends it with one line; checkpoints stay as they are.

    Args:
        trainer: The training.
        described: What was too much and what to change.

    Raises:
        UserError: With the batch, the crop, what was estimated, what the device has, and what to change.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        where = f"{type(error).__name__} after step {trainer.step}"
        # what the failed step held is needed to say anything
        traceback.clear_frames(error.__traceback__)
        if trainer.optimizer is not None:
            trainer.optimizer.zero_grad(set_to_none=True)
        raise UserError(f"out of memory ({where}): {described(trainer)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in SAID)


def pretraining_described(trainer: PretrainingTrainer) -> str:
    checked = trainer.checked
    batch = -(-checked.batch_size // world())
    total = device_memory(trainer.device)
    crop = "x".join(map(str, checked.geometry.crop_size))
    needs = f"a batch of {batch} crops of {crop} does not fit {_device_name(trainer.device)} ({total / GIB:.1f} GiB)"
    try:
        needs, fits = _estimated(trainer, needs, batch, total)
    except Exception:  # an estimate is a help; without it the line says the rest
        fits = ""
    change = [f"a smaller nnssl_ext.batch_size (now {checked.batch_size}{fits})", "a smaller nnssl_ext.crop_size"]
    if not checked.common.activation_checkpointing:
        change.append("nnssl_ext.activation_checkpointing=true")
    return (
        f"{needs}. Use {', '.join(change[:-1])} or {change[-1]} (nnssl_ext plan); checkpoints written before are intact"
    )


def finetuning_described(trainer: nnsslTrainer_Finetune) -> str:
    """What was too much for a fine-tuning, and what to change."""
    configuration = trainer.configuration_manager
    crop, total = "x".join(map(str, configuration.patch_size)), device_memory(trainer.device)
    device = f"{_device_name(trainer.device)} ({total / GIB:.1f} GiB)"
    return (
        f"a batch of {trainer.batch_size} crops of {crop} does not fit {device}. Use a smaller "
        f"configuration.batch_size (now {configuration.batch_size}) or configuration.patch_size "
        f"(nnssl_ext plan); checkpoints written before are intact"
    )


def _estimated(trainer: PretrainingTrainer, needs: str, batch: int, total: int) -> tuple[str, str]:
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
    geometry = trainer.checked.geometry
    memory = planned_memory(trainer.method_class, plans, configuration, trainer.dataset_json, geometry=geometry)
    largest = memory.largest_batch(total) * world()
    fits = f", an estimated {largest} fits" if 0 < largest < trainer.checked.batch_size else ""
    return f"{needs}, which needs an estimated {memory.peak(batch) / GIB:.1f} GiB on a GPU", fits


def device_memory(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
