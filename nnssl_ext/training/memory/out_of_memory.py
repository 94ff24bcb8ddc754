"""Report a lack of memory in one line, with advice."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nnssl_ext.configurations import configuration_of
from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.training.checks import Checked
from nnssl_ext.training.distributed.ranks import world
from nnssl_ext.training.memory.estimate import GIB, planned_memory

#: Messages of allocators, drivers, compilers and libraries, which raise plain RuntimeErrors.
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
#: What cuDNN and cuBLAS say where no memory is left for their workspace, but not only then.
UNCLEAR = (
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
#: Free memory in bytes below which these mean a lack of it.
LITTLE = 2**29


@contextmanager
def out_of_memory_line(
    advice: Callable[[], str], step: Callable[[], int], release: Callable[[], None]
) -> Iterator[None]:
    """Turn a lack of memory into a UserError of one line.

    Checkpoints stay as they are. ``step`` returns the finished steps, ``release`` frees what the failed one held.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        where = f"{type(error).__name__} after step {step()}"
        # the advice needs memory, too
        traceback.clear_frames(error.__traceback__)
        release()
        raise UserError(f"out of memory ({where}): {advice()}") from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in MESSAGES):
        return True
    return any(text in str(error) for text in UNCLEAR) and _free_memory() < LITTLE


def _free_memory() -> float:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf


def pretraining_advice(
    method: type[Method], checked: Checked, plans: dict, configuration: str, dataset_json: dict, device: torch.device
) -> str:
    """Describe what was too much for a device in pretraining."""
    batch = -(-checked.batch_size // world())
    total = device_memory(device)
    crop = "x".join(map(str, checked.geometry.crop_size))
    needs = f"a batch of {batch} crops of {crop} does not fit {_device_name(device)}"
    fits = ""
    try:
        memory = planned_memory(method, plans, configuration, dataset_json, geometry=checked.geometry)
        largest = memory.largest_batch(total) * world()
        fits = f", an estimated {largest} fits" if 0 < largest < checked.batch_size else ""
        needs += f", which needs an estimated {memory.peak(batch) / GIB:.1f} GiB on a GPU"
    except (Exception, UserError):  # an estimate is a help; without it the line still tells the rest
        fits = ""
    change = [f"a smaller nnssl_ext.batch_size (now {checked.batch_size}{fits})", "a smaller nnssl_ext.crop_size"]
    size = list(checked.geometry.crop_size)
    if checked.common.crop_size is None and size != list(configuration_of(plans, configuration)["patch_size"]):
        # the method chose smaller crops; a batch alone would switch that off
        change[0] = f"nnssl_ext.crop_size={json.dumps(size, separators=(',', ':'))} with {change[0]}"
    if not checked.common.activation_checkpointing:
        change.append("nnssl_ext.activation_checkpointing=true")
    return (
        f"{needs}. Use {', '.join(change[:-1])} or {change[-1]} (nnssl_ext plan); checkpoints written before are intact"
    )


def finetuning_advice(batch_size: int, configuration: Any, device: torch.device) -> str:
    """Describe what was too much for a device in fine-tuning."""
    crop = "x".join(map(str, configuration.patch_size))
    other = len(configuration.patch_size) != 3 or configuration.previous_stage_name is not None
    return (
        f"a batch of {batch_size} crops of {crop} does not fit {_device_name(device)}. Use a smaller "
        f"configuration.batch_size (now {configuration.batch_size}) or configuration.patch_size "
        f"({'in the plans' if other else 'nnssl_ext plan'}); checkpoints written before are intact"
    )


def device_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes, 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    # Windows does not tell
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    total = device_memory(device)
    return f"{name} ({total / GIB:.1f} GiB)" if total else name
