"""The folder of one run: one process at a time, nothing lost in it, and which of its checkpoints to go on from."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from nnunetv2.utilities.helpers import empty_cache

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import world

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
    from nnssl_ext.training.run.writer import CheckpointWriter

FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
LATEST, PREVIOUS = "checkpoint_latest.pth", "checkpoint_previous.pth"
#: Where ``--c`` may go on from, the newest first.
CHAIN = (FINAL, LATEST, PREVIOUS, BEST)
#: A fine-tuning's weights after chosen steps.
SNAPSHOTS = "checkpoint_step_*.pth"
LOCK, HOLDER = ".nnssl_ext.lock", ".nnssl_ext.holder.json"
#: progress.png is drawn at most this often, and after the last epoch.
DRAW_SECONDS = 15.0


class Training(Protocol):
    """What looks after a run's folder and its end needs to know of the run: of a pretraining or a fine-tuning."""

    output_folder: Any
    local_rank: int
    disable_checkpointing: bool
    device: torch.device
    fold: Any
    configuration_name: str
    plans_manager: Any
    logger: Any
    dataloader_train: Any
    dataloader_val: Any
    current_epoch: int
    num_epochs: int
    #: Optimiser steps done, and whether it was started with ``--c``.
    step: int
    continuing: bool
    #: When progress.png was drawn or the run began, as time.monotonic() has it.
    drawn: float
    writer: CheckpointWriter

    def print_to_log_file(self, *words: Any) -> None: ...

    def save_checkpoint(self, *filenames: str) -> None: ...

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None: ...


@contextmanager
def entered(trainer: Training) -> Iterator[None]:
    """Around a training: its folder locked, nothing of an earlier run overwritten, the right checkpoint taken; what is
    being written is whole before the folder is free."""
    folder = Path(trainer.output_folder)
    with locked(folder) if trainer.local_rank == 0 else nullcontext(), trainer.writer:
        found = [folder / name for name in CHAIN if (folder / name).is_file()]
        if trainer.step == 0 and trainer.continuing and found:
            # stock looks for three names only, and would start anew
            trainer.load_checkpoint(str(found[0]))
        elif trainer.step == 0 and trainer.local_rank == 0 and not trainer.disable_checkpointing:
            set_aside(folder, trainer.print_to_log_file)
        refuse_unshared(trainer, trainer.step)
        yield


def finish(trainer: Training, stocks_end: Callable[[], None]) -> None:
    """``stocks_end`` of a training, and no other checkpoint than the final one; where none is written all stay.

    Stock removes checkpoint_latest.pth in any case, an earlier run's too.
    """
    if trainer.disable_checkpointing:
        empty_cache(trainer.device)
        trainer.print_to_log_file("Training done; no checkpoint was written, as --disable_checkpointing says.")
        return
    stocks_end()
    remove_previous(trainer)


def refuse_unshared(trainer: Training, found: Any) -> None:
    """One line, in all processes, where they do not find the same: machines with results folders of their own.

    Raises:
        UserError: If ``found`` differs.
    """
    everywhere = [found] * world()
    if world() > 1:
        dist.all_gather_object(everywhere, found)
    if any(other != everywhere[0] for other in everywhere):
        raise UserError(
            f"the processes find different checkpoints of fold {trainer.fold}, in their order: {everywhere}; "
            f"nnUNet_results must be a folder that all machines share"
        )


def checkpoints(trainer: Training) -> list[str]:
    """The names of those in the run's folder."""
    return [name for name in CHAIN if (Path(trainer.output_folder) / name).is_file()]


def start(trainer: PretrainingTrainer, stocks_start: Callable[[], None]) -> None:
    """``stocks_start`` in the first process; the others do the same without its files, which stock lets all write."""
    if trainer.local_rank == 0:
        stocks_start()
        return
    if not trainer.was_initialized:
        trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    dist.barrier()  # stock's own


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run's folder for this process alone; the system releases the lock however a process ends.

    Raises:
        UserError: If another process works there; it is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} belongs to another run, {_described(holder)}; wait for it or stop it") from error
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.strerror or error}") from error
    try:
        with suppress(OSError):  # the lock holds without its label
            label = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            holder.write_text(json.dumps(label), encoding="utf-8")
        remove_unfinished(folder)
        yield
    finally:
        # the folder is as stock leaves it; a killed run leaves these two files, which hold nobody up
        with suppress(OSError):
            holder.unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _described(holder: Path) -> str:
    try:
        label = json.loads(holder.read_text(encoding="utf-8")[:1000])
        return f"process {int(label['pid'])} on {label['host']!r} since {label['since']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that left no name"


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was writing: the temporary files of checkpoints."""
    for path in folder.glob(".checkpoint_*.tmp"):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, tell: Callable[[str], None]) -> None:
    """Before a run that starts anew: move the checkpoints of an earlier one into a folder of their own."""
    found = [folder / name for name in CHAIN if (folder / name).is_file()]
    found += sorted(folder.glob(SNAPSHOTS))
    if not found:
        return
    target = folder / f"earlier_{time.strftime('%Y%m%d_%H%M%S')}"
    target.mkdir()
    for path in found:
        os.replace(path, target / path.name)
    names = ", ".join(path.name for path in found)
    tell(f"Starting anew (without --c); the checkpoints of an earlier run are kept in {target}: {names}")


def keep_previous(latest: Path) -> None:
    """Give checkpoint_latest.pth a second name, checkpoint_previous.pth; it stays where it is, too."""
    folder, previous = latest.parent, latest.parent / PREVIOUS
    if not latest.is_file():
        return
    temporary = folder / f".{PREVIOUS}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(latest, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(latest, temporary)
    os.replace(temporary, previous)


def remove_previous(trainer: Training) -> None:
    """After checkpoint_final.pth was written and read back."""
    if trainer.local_rank == 0 and (Path(trainer.output_folder) / FINAL).is_file():
        (Path(trainer.output_folder) / PREVIOUS).unlink(missing_ok=True)


def save(trainer: Training, collect: Callable[[], dict[str, Any]], *filenames: str) -> None:
    """Write checkpoints of the run as it is: the first process's, unless they are switched off.

    Raises:
        UserError: If one cannot be written, or the one before could not be; unless the settings say to go on.
    """
    if trainer.local_rank != 0:
        return
    if trainer.disable_checkpointing:
        trainer.print_to_log_file("No checkpoint written, checkpointing is disabled")
        return
    trainer.writer.write(collect(), *map(Path, filenames))


def keep_epoch(trainer: Training, *, latest: bool, best: bool) -> None:
    """After an epoch: write the checkpoints that are due, of one and the same state, and draw the progress.

    A picture costs about a second of a core: epochs that are shorter than ``DRAW_SECONDS`` share one.
    """
    names = [*([LATEST] if latest else []), *([BEST] if best else [])]
    if names:
        trainer.save_checkpoint(*(str(Path(trainer.output_folder) / name) for name in names))
    last = trainer.current_epoch + 1 >= trainer.num_epochs
    if trainer.local_rank == 0 and (last or time.monotonic() - trainer.drawn > DRAW_SECONDS):
        draw_progress(trainer)
        trainer.drawn = time.monotonic()


def load(trainer: Training, file: Path) -> tuple[dict[str, Any], str]:
    """The checkpoint to use, and where it is from; a run that is continued may fall back to an earlier one."""
    if trainer.continuing:
        return load_newest(file, trainer.print_to_log_file)
    return checkpoint.load(file), str(file)


def draw_progress(trainer: Training) -> None:
    """progress.png, for which no run ends."""
    try:
        trainer.logger.plot_progress_png(trainer.output_folder)
    except OSError as error:
        trainer.print_to_log_file(f"WARNING: progress.png could not be written: {error.strerror or error}")
    # a closed figure is garbage in cycles, 60 MiB in nnU-Net's size, which Python finds many epochs later by itself
    gc.collect()


def load_newest(file: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """The checkpoint in ``file``, or if it is damaged the newest one before it in its folder, and its name.

    Raises:
        UserError: If none can be read; nothing is deleted or written.
    """
    problems = []
    start = CHAIN.index(file.name) if file.name in CHAIN else 0
    for path in [file, *(file.parent / name for name in CHAIN[start + 1 :])]:
        if path != file and not path.is_file():
            continue
        try:
            content = checkpoint.load(path)
        except UserError as error:
            problems.append(error.line)
            tell(f"WARNING: {error.line}")
            continue
        if problems:
            tell(f"WARNING: going on from the one before it, {path}: the steps since then are done again")
        return content, str(path)
    raise UserError(
        f"{'; '.join(problems)}; none can be read, and nothing was deleted. Restore one, or start anew without --c"
    )
