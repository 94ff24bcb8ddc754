"""nnU-Net's environment variables, as far as they concern us."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from nnssl_ext.errors import UserError
from nnssl_ext.resources import resource_folder

#: Hours, of ``nnssl_ext train --max-time``; it goes before the setting ``max_time``.
MAX_TIME = "nnssl_ext_max_time"
#: torch's own.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
#: glibc's own, with their numbers in malloc.h: from how many bytes on an array is the system's, and returned to it.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
#: What to ask for: glibc before 2.35 refuses more than 32 MiB.
MOST_KEPT = (2**31 - 1, 32 << 20)


def dataset_folder(name_or_id: str) -> Path:
    """The data set's folder in nnUNet_preprocessed.

    Raises:
        UserError: If the variable is not set or no or several folders match.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise UserError("nnUNet_preprocessed is not set; export it as nnU-Net's documentation says")
    pattern = name_or_id if name_or_id.startswith("Dataset") else f"Dataset{_identifier(name_or_id):03d}_*"
    found = [path for path in Path(root).glob(pattern) if path.is_dir()]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        raise UserError(f"expected one data set {pattern} in {root}, found {names}; plan and preprocess it first")
    return found[0]


def _identifier(text: str) -> int:
    if not text.isdigit():
        raise UserError(f"a data set is given as DatasetXXX_NAME or by its number, got '{text}'")
    return int(text)


def commands_path() -> str:
    """PATH with this Python's commands first: nnU-Net's and ours, of the very environment that is asked."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def named_trainer_folders() -> list[str]:
    """The folders that nnUNet_extTrainer names."""
    return [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]


def trainer_folders() -> str:
    """nnUNet_extTrainer as it is, and our trainers if they are not among it."""
    named, ours = named_trainer_folders(), str(resource_folder("trainers"))
    return os.pathsep.join(named if ours in named else [*named, ours])


def cores() -> int:
    """CPU cores that this process may use, which a scheduler or a container may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """Processes or threads that may read: nnUNet_n_proc_DA, else up to four; box reads need no more."""
    if "nnUNet_n_proc_DA" in os.environ:
        return int(os.environ["nnUNet_n_proc_DA"])
    return min(4, cores())


def launched() -> bool:
    """Whether torchrun, or who sets what it sets, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def time_limit(hours: float | None) -> float | None:
    """The limit in hours: the variable's, else the setting's.

    Raises:
        UserError: If the variable is no positive number.
    """
    text = os.environ.get(MAX_TIME, "")
    if not text:
        return hours
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"--max-time (or {MAX_TIME}) must be a positive number of hours, got '{text}'")
    return value


def set_threads(device: str) -> None:
    """On the CPU: as many threads as OMP_NUM_THREADS says, where it is set.

    Stock nnUNetv2_train sets torch to all cores, whatever the variable says; two trainings side by side then spin
    against each other, several times slower each than with their own share of the cores.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if device == "cpu" and wanted.isdigit() and int(wanted):
        import torch

        torch.set_num_threads(int(wanted))


def keep_memory(device: str) -> None:
    """On the CPU: take memory from the system in huge pages and keep it, in this process and those that it starts.

    A new array is else filled with zeros by the system 4 KiB at a time, and what is freed goes back at once: for arrays
    of tens of MiB that is up to a third of the time of a step. torch asks for huge pages from 2 MiB on; glibc keeps
    arrays of up to 2 GiB. Variables that are set already stay; systems without either ignore it.
    """
    if device != "cpu":
        return
    os.environ.setdefault(HUGE_PAGES, "1")  # torch looks at it at the first such array
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in KEPT_MEMORY):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    from_size, _ = KEPT_MEMORY.values()
    most = next((most for most in MOST_KEPT if mallopt(from_size, most)), 0)
    for name, parameter in KEPT_MEMORY.items() if most else ():
        # both or none: either alone would only stop glibc from adapting its own limits
        os.environ[name] = str(most)
        mallopt(parameter, most)
