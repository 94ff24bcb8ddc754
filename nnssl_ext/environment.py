"""Read and check nnU-Net's environment."""

from __future__ import annotations

import locale
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

from nnssl_ext.errors import UserError

#: Hours, of ``nnssl_ext train --max-time``. It overrides the setting ``max_time``.
MAX_TIME = "nnssl_ext_max_time"
#: Variables that nnU-Net reads as numbers of processes, some at its import.
PROCESSES = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc")
#: Where torch passes batches between processes.
SHARED_MEMORY = Path("/dev/shm")


def use_utf8() -> None:
    """Run again in UTF-8 mode where the locale differs.

    nnU-Net reads JSON and writes logs in the locale's encoding. Processes that are started inherit the mode.
    """
    if sys.flags.utf8_mode or "PYTHONUTF8" in os.environ or locale.getpreferredencoding(False).lower() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    words = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # there, exec does not wait for the new process
        import subprocess

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the new process, whose status counts
        sys.exit(subprocess.call(words))
    os.execv(sys.executable, words)


def named_folder(name: str) -> Path:
    """Return the folder that a variable names.

    Raises:
        UserError: If the variable is empty.
    """
    value = os.environ.get(name, "")
    if not value.strip():
        raise UserError(f"{name} is not set. Export it as nnU-Net's documentation says, or ask nnssl_ext doctor")
    return Path(value)


def required_folder(name: str) -> Path:
    """Return the folder that one of nnU-Net's variables names.

    Raises:
        UserError: If the variable is empty or names no folder.
    """
    folder = named_folder(name)
    if not folder.is_dir():
        raise UserError(f"{name} names {folder}, which is no folder. Make it, or correct the variable")
    return folder


def process_problem(name: str) -> str:
    """Return why nnU-Net cannot use a variable, else ''."""
    value = os.environ.get(name)
    if value is None or (value.isascii() and value.isdigit()):
        return ""
    return f"is {value!r}, not a number of processes"


def check_processes() -> None:
    """Refuse numbers of processes that stop nnU-Net.

    Raises:
        UserError: For the first such variable.
    """
    for name in PROCESSES:
        if problem := process_problem(name):
            raise UserError(f"{name} {problem}. Export {name}=4, or unset it")


def dataset_folder(name_or_id: str) -> Path:
    """Return the data set's folder in nnUNet_preprocessed.

    Raises:
        UserError: If the variable is not set or no or several folders match.
    """
    root, word = required_folder("nnUNet_preprocessed"), name_or_id.rstrip("/\\")
    if word.startswith("Task"):
        raise UserError(
            f"'{word}' is a name of nnU-Net v1 or of the Decathlon. Convert it with "
            f"nnUNetv2_convert_old_nnUNet_dataset or nnUNetv2_convert_MSD_dataset, then plan and preprocess it"
        )
    if word.startswith("Dataset"):
        pattern, found = word, [root / word] * (root / word).is_dir()
    else:
        pattern = f"Dataset{_identifier(word):03d}_*"
        found = sorted(path for path in root.iterdir() if path.name.startswith(pattern[:-1]) and path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"expected one data set {pattern} in {root}, found {names}. Plan and preprocess it first")
    return found[0]


def _identifier(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise UserError(f"a data set is given as DatasetXXX_NAME or by its number, got '{text}'")
    return int(text)


def commands_path() -> str:
    """Return PATH with this environment's commands first."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = dict.fromkeys([str(Path(sys.executable).parent), *(sysconfig.get_path("scripts", s) for s in schemes)])
    return os.pathsep.join([*folders, os.environ.get("PATH", "")])


def program(name: str) -> str:
    """Return the path of an installed command, such as nnUNetv2_train.

    The environment need not be activated. Windows does not search the PATH that is given to a new process.

    Raises:
        UserError: If it is not installed.
    """
    found = shutil.which(name, path=commands_path())
    if found is None:
        raise UserError(f"the command {name} was not found beside {sys.executable}. Install nnunetv2 there")
    return found


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """Return the number of reading processes. nnUNet_n_proc_DA, else up to four: box reads need no more."""
    if "nnUNet_n_proc_DA" in os.environ:
        return int(os.environ["nnUNet_n_proc_DA"])
    return min(4, cores())


def check_device(device: str, resamples: bool = False) -> None:
    """Refuse a device that torch does not find, or on which it cannot resample 3-D crops where that is needed.

    Raises:
        UserError: With the device to use instead.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found. Use -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device was found (Apple silicon has one). Use -device cpu, or cuda on a GPU")
    if device == "mps" and resamples and torch.__version__ < "2.10":
        raise UserError(f"MPS needs torch 2.10 (it resamples 3-D crops), this is {torch.__version__}. Use -device cpu")


def default_device() -> str:
    """Return 'cuda' where torch finds a GPU, else 'cpu'."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Refuse a /dev/shm that is too small for batches.

    torch ends with a bus error there.

    Raises:
        UserError: If fewer batches fit than there are workers, or fewer than two.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, batch_bytes * max(2, workers)
    if free < needed:
        batch, needed_mib = (f"{value / 2**20:.1f} MiB" for value in (batch_bytes, needed))
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB free, {workers} workers with batches of {batch} need "
            f"{needed_mib}. Start the container with --shm-size=8g or --ipc=host, or set a smaller nnUNet_n_proc_DA "
            f"(0 needs none, but nnU-Net's validation and prediction do)"
        )


def check_split(folder: Path, fold: int | str) -> None:
    """Refuse a read-only data set without a split.

    Args:
        folder: The preprocessed data set.
        fold: Number, or 'all', which needs no split.

    Raises:
        UserError: If the split cannot be written.
    """
    if fold == "all" or (folder / "splits_final.json").is_file() or os.access(folder, os.W_OK):
        return
    raise UserError(
        f"{folder} is read-only and has no splits_final.json, which nnU-Net writes at the first training. Put one "
        f"there, make the folder writable, or use fold all"
    )


def launched() -> bool:
    """Return whether torchrun or the like started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def time_limit(hours: float | None) -> float | None:
    """Return the limit in hours: variable, else setting.

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
    """Limit torch's threads to OMP_NUM_THREADS on the CPU.

    Stock nnUNetv2_train sets torch to all cores. Two trainings side by side then spin against each other, and each is
    several times slower than with its own share of the cores.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if device == "cpu" and wanted.isdigit() and int(wanted):
        import torch

        torch.set_num_threads(int(wanted))
