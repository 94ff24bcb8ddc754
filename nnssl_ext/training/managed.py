"""Run nnU-Net's trainer past interruptions, damaged files and lost workers.

It owns the run's folder, signals, checkpoints, ``--c``, the epoch loop and the ending. The trainers of pretraining and
of fine-tuning derive from it and fill a few hooks.
"""

from __future__ import annotations

import multiprocessing
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import time
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.utilities.helpers import empty_cache
from torch import nn
from tqdm import tqdm

from nnssl_ext import checkpoint as checkpoint_file
from nnssl_ext.data.loader import Shard, SteadyLoader
from nnssl_ext.environment import set_threads
from nnssl_ext.errors import UserError
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.networks.target import target_network
from nnssl_ext.settings import CommonSettings
from nnssl_ext.training.distributed.heartbeat import Heartbeat
from nnssl_ext.training.distributed.ranks import rank, rank_device, same_everywhere, world
from nnssl_ext.training.distributed.store import from_the_first
from nnssl_ext.training.memory.out_of_memory import out_of_memory_line
from nnssl_ext.training.resumable import ResumableTrainer
from nnssl_ext.training.run.commands import continuation
from nnssl_ext.training.run.folder import BEST, LATEST, RunFolder
from nnssl_ext.training.run.interruption import Interruption
from nnssl_ext.training.run.picture import ProgressPicture
from nnssl_ext.training.run.writer import CheckpointWriter
from nnssl_ext.training.wrapping import mixed_precision
from nnssl_ext.transfer.start import pretrained_weights_argument


class ManagedTrainer(ResumableTrainer):
    """Manage a run of stock nnU-Net's trainer.

    Attributes:
        common: Settings that all trainers share.
    """

    common: CommonSettings
    was_initialized: bool
    network: Any
    dataloader_train: Any
    dataloader_val: Any
    #: It ends in time when asked to (``--max-time``).
    time_limited = True
    #: Stock's training and prediction build the target trainer's network.
    build_network_architecture: Callable[..., nn.Module] = staticmethod(target_network)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        with Heartbeat():
            self.common, precision = self.check(plans, configuration, fold, dataset_json, device)
            self.amp_dtype = mixed_precision(device, precision)
        self.continuing = bool(plans.get("continue_training"))
        super().__init__(plans, configuration, fold, dataset_json, device)
        set_threads(device.type)
        if self.common.keep_host_memory:
            keep_memory(device.type)
        self.device = rank_device(device)
        # bfloat16 has the range of float32: only float16 needs its gradients scaled
        self.grad_scaler = torch.amp.GradScaler("cuda") if self.amp_dtype is torch.float16 else None
        self.step = 0
        self.loaded = ""  # name of the checkpoint that was loaded last, before or after the training
        self.outputs: list[dict[str, Any]] = []
        log = self.print_to_log_file
        self.folder = RunFolder(Path(self.output_folder), log)
        same_everywhere(self.folder.checkpoints(), fold)
        self.interruption = Interruption(self.common.max_time, self.device)
        self.writer = CheckpointWriter(
            self.common.write_in_background, self.common.on_write_failure == "go_on", self.print_to_log_file
        )
        self.picture = ProgressPicture(lambda: self.logger.plot_progress_png(self.output_folder), log)
        self.set_up()

    @abstractmethod
    def check(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device
    ) -> tuple[CommonSettings, str]:
        """Check all input before writing. Return the common settings and the precision."""

    def set_up(self) -> None:
        """Set a trainer's own attributes.

        It ends ``__init__``, whose signature nnU-Net reads.
        """

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch. The last may have fewer."""

    @abstractmethod
    def checkpoint_content(self, paths: list[Path]) -> dict[str, Any]:
        """Return what is written to ``paths``."""

    @abstractmethod
    def restore_content(self, content: dict[str, Any], source: str) -> None:
        """Restore the state from a checkpoint of this run. Messages name its ``source``."""

    @abstractmethod
    def is_sound(self) -> bool:
        """Check that the state is finite and worth keeping."""

    def loader(self, dataset: Any, shard: Shard, workers: int, **join: Callable[[list], Any]) -> SteadyLoader:
        """Return a loader of a shard's batches."""
        return SteadyLoader(
            dataset,
            shard,
            workers=workers,
            pin_memory=self.device.type == "cuda",
            log=self.print_to_log_file,
            waiting=self.leave_if_asked_alone,
            **join,
        )

    @staticmethod
    def validation_workers(workers: int) -> int:
        """Return at most one. Where processes are not forked, each validation would import torch anew."""
        return min(1, workers) if multiprocessing.get_start_method() == "fork" else 0

    def gather_outputs(self) -> list[dict[str, Any]]:
        """Gather the outputs of this epoch's steps from all processes."""
        return self.outputs

    def after_step(self) -> None:
        """Run after each optimizer step. It may raise."""

    def before_training(self) -> None:
        """Run before the first step of this process."""

    def after_training(self) -> None:
        """Run after the last checkpoint."""

    @abstractmethod
    def out_of_memory_advice(self) -> str:
        """Describe what did not fit the memory, and what to change."""

    def run_training(self) -> None:
        with Heartbeat(), self._entered(), self.interruption, self._out_of_memory_line():
            self.on_train_start()
            self.before_training()
            for _ in range(self.current_epoch, self.num_epochs):
                self.on_epoch_start()
                self.on_train_epoch_start()
                self.on_train_epoch_end(self._training_steps())
                self.writer.wait()  # a checkpoint has an epoch's time; workers are not forked beside it
                self.on_validation_epoch_start()
                with torch.no_grad():
                    batches = self._shown(self.dataloader_val, "validation", self.num_val_iterations_per_epoch)
                    with self._progress_kept():
                        outputs = [self.validation_step(batch) for batch in batches]
                    self.on_validation_epoch_end(outputs)
                self.outputs = []
                self.on_epoch_end()
            self.loaded = ""
            self.on_train_end()
            self.after_training()

    def _out_of_memory_line(self) -> AbstractContextManager[None]:
        def release() -> None:
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)

        return out_of_memory_line(self.out_of_memory_advice, lambda: self.step, release)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Lock the folder and load the right checkpoint."""
        lock: AbstractContextManager = self.folder.locked() if self.local_rank == 0 else nullcontext()
        with lock, self.writer:
            found = self.folder.checkpoints()
            if self.step == 0 and self.continuing and found:
                # stock looks for three names only, and would start anew
                self.load_checkpoint(str(self.folder.path / found[0]))
            elif self.step == 0 and self.local_rank == 0 and not self.disable_checkpointing:
                self.folder.set_aside(pretrained_weights_argument(sys.argv), self.common.start_from)
            if self.local_rank == 0 and 0 < self.step < self.total_steps and not self.disable_checkpointing:
                self.folder.reopen()
            same_everywhere(self.step, self.fold)
            yield

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            super().on_train_start()
            return
        # the same without stock's files, which stock lets all processes write
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        dist.barrier()  # stock's own

    def _training_steps(self) -> list[dict[str, Any]]:
        """Do the remaining steps of an epoch. Return all outputs.

        After an error in data or numbers, or SystemExit(0) on demand, all steps before are in checkpoint_latest.pth.
        """
        left = self._last_step_of_epoch() - self.step
        batches = (next(self.dataloader_train) for _ in range(left))
        with self._progress_kept():
            for batch in self._shown(batches, "training", left):
                self.outputs.append(self.train_step(batch))
                self.after_step()
                self.leave_if_asked()
        return self.outputs

    @contextmanager
    def _progress_kept(self) -> Iterator[None]:
        """Write checkpoint_latest.pth if data or numbers do not allow to continue."""
        try:
            yield
        except UserError:
            # one of several processes cannot write a checkpoint alone
            if world() == 1 and self.step and self.is_sound():
                self.keep_progress()
            raise

    def _shown(self, batches: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        hidden = rank() > 0 or not sys.stderr.isatty()
        return tqdm(batches, f"Epoch {self.current_epoch}, {what}", total, disable=hidden, leave=False)

    def _last_step_of_epoch(self) -> int:
        return min((self.current_epoch + 1) * self.steps_per_epoch, self.total_steps)

    def next_epoch(self) -> int:
        """Return the epoch to continue with. It is this one until its steps and their evaluation are done."""
        done = self.step >= self._last_step_of_epoch() and not self.outputs
        return self.current_epoch + int(done)

    def on_epoch_end(self) -> None:
        """Log the epoch, write what is due, and draw the progress.

        Stock writes checkpoint_latest.pth first. A run that is killed between the two keeps an old best one.
        """
        log = self.logger.get_value
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        for name, key in (("train_loss", "train_losses"), ("val_loss", "val_losses")):
            self.print_to_log_file(name, np.round(log(key, step=-1), 4))
        for line in self.epoch_lines():
            self.print_to_log_file(*line)
        seconds = log("epoch_end_timestamps", step=-1) - log("epoch_start_timestamps", step=-1)
        self.print_to_log_file(f"Epoch time: {seconds:.2f} s")
        best = self.is_best()
        last = self.current_epoch == self.num_epochs - 1
        names = [BEST] * best + [LATEST] * (self.latest_is_due(best) and not last)
        if names:
            self.save_checkpoint(*(str(self.folder.path / name) for name in names))
        if self.local_rank == 0:
            self.picture.update(last)
        self.current_epoch += 1

    @abstractmethod
    def epoch_lines(self) -> list[tuple[Any, ...]]:
        """Return an epoch's log lines beside its losses."""

    @abstractmethod
    def is_best(self) -> bool:
        """Check whether the newest epoch is the best so far."""

    def latest_is_due(self, best: bool) -> bool:
        """Check whether checkpoint_latest.pth is due after this epoch."""
        return (self.current_epoch + 1) % self.save_every == 0

    def on_train_end(self) -> None:
        """Write the final checkpoint. If that fails, keep all others.

        Stock removes checkpoint_latest.pth in any case, an earlier run's too.
        """
        if self.disable_checkpointing:
            empty_cache(self.device)
            self.print_to_log_file("Training done; no checkpoint was written, as --disable_checkpointing says.")
        else:
            super().on_train_end()
            if self.local_rank == 0:
                self.folder.remove_previous()
        self.end_workers()

    def end_workers(self) -> None:
        self.dataloader_train = self.dataloader_val = None

    def leave_if_asked(self) -> None:
        """Write a checkpoint and end the process, if asked to."""
        if reason := self.interruption.agreed(self.step):
            self.leave(reason, self.keep_progress())

    def leave_if_asked_alone(self) -> None:
        """Call ``leave_if_asked`` where there is one process only."""
        if world() == 1:
            self.leave_if_asked()

    def leave(self, reason: str, kept: bool) -> NoReturn:
        """End the process and log how to continue. ``kept`` says that a checkpoint of this step was written."""
        outcome = "nothing is lost. G" if kept else "NO CHECKPOINT WAS WRITTEN. G"
        self.print_to_log_file(
            f"Stopped by {reason} after step {self.step} of {self.total_steps}; {outcome}o on with:\n"
            f"    {continuation(self.run_name, self.device.type)}"
        )
        self.end_workers()
        raise SystemExit(0)

    def keep_progress(self) -> bool:
        """Write checkpoint_latest.pth within an epoch. Return whether that worked."""
        self.outputs = self.gather_outputs()
        self.save_checkpoint(str(self.folder.path / LATEST))
        return self.writer.wait() and not self.disable_checkpointing

    def keep_progress_together(self) -> None:
        """Write checkpoint_latest.pth where several processes stop at one step, before an error that all raise."""
        if world() > 1 and from_the_first(f"sound {self.step}", self.is_sound):
            self.keep_progress()
            from_the_first(f"kept {self.step}", lambda: None)  # one that ended would end the first, which still writes

    def save_checkpoint(self, *filenames: str) -> None:
        """Write checkpoints from the first process, unless switched off.

        Raises:
            UserError: If one cannot be written, or the one before could not be, unless the settings say to go on.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        paths = [Path(name) for name in filenames]
        self.writer.write(self.checkpoint_content(paths), *paths)

    def load_checkpoint(
        self, filename_or_checkpoint: dict | str | None = None, *, checkpoint: dict | str | None = None
    ) -> None:
        """Continue from a checkpoint of the same run, exactly.

        Its path or content has another name in nnU-Net's master.
        """
        given = filename_or_checkpoint if checkpoint is None else checkpoint
        source = "the checkpoint"
        if not isinstance(given, dict):
            path = Path(str(given))
            given, source = (
                self.folder.load_newest(path) if self.continuing else (checkpoint_file.load(path), str(path))
            )
        checkpoint_file.refuse_older(given, source)
        self.restore_content(given, source)
        self.loaded = Path(source).name

    def autocast(self) -> AbstractContextManager:
        """Return a context of mixed precision."""
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype is not None else nullcontext()
