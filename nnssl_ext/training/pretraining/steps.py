"""The steps of an epoch, and the ways in which a run ends amid them without losing one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.run import folder as run_folder
from nnssl_ext.training.run.interruption import leave

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer

#: The terms of the steps of an epoch, one dict a step.
Outputs = list[dict[str, Tensor]]


def training_steps(trainer: PretrainingTrainer, batches: Iterable[CropBatch]) -> Outputs:
    """Do an epoch's remaining steps; the terms of all of them, those before an interruption included.

    Raises:
        UserError: If data or numbers do not allow to go on; all steps before are then in checkpoint_latest.pth.
        SystemExit: With status 0 when the run was asked to end; likewise.
    """
    outputs = trainer.outputs
    try:
        for batch in batches:
            outputs.append(trainer.train_step(batch))
            if trainer.guard.problem:
                raise UserError(trainer.guard.problem)
            leave_if_asked(trainer)
        trainer.guard.read()
        if trainer.guard.problem:
            raise UserError(trainer.guard.problem)
    except UserError:
        # one of several processes cannot do this alone
        if world() == 1:
            trainer.guard.read()
            if trainer.step and trainer.guard.sound():
                keep_progress(trainer)
        raise
    trainer.outputs = []
    return outputs


def leave_if_asked(trainer: PretrainingTrainer) -> None:
    """Between two steps: write a checkpoint and end the process if a signal or the time limit asks for it."""
    reason = trainer.interruption.agreed(trainer.step)
    if reason:
        _leave(trainer, reason)


def _leave(trainer: PretrainingTrainer, reason: str) -> NoReturn:
    trainer.guard.read()
    leave(trainer, reason, keep_progress(trainer), trainer.num_epochs * trainer.num_iterations_per_epoch)


def keep_progress(trainer: PretrainingTrainer) -> bool:
    """Write checkpoint_latest.pth amid an epoch; whether it was written."""
    trainer.outputs = _of_all_processes(trainer.outputs)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / run_folder.LATEST))
    return trainer.writer.wait() and not trainer.disable_checkpointing


def _of_all_processes(outputs: Outputs) -> Outputs:
    if world() == 1:
        return outputs
    everyone: list[Outputs] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, [{k: v.cpu() for k, v in step.items()} for step in outputs])
    return [step for part in everyone for step in part]


def next_epoch(trainer: PretrainingTrainer) -> int:
    """The epoch that a run goes on with: this one if its steps or their evaluation are not done."""
    done = trainer.step >= (trainer.current_epoch + 1) * trainer.num_iterations_per_epoch and not trainer.outputs
    return trainer.current_epoch + int(done)


def stored(outputs: Outputs) -> dict[str, Tensor]:
    """An epoch's terms so far, as a checkpoint keeps them: one tensor a term."""
    return {key: torch.cat([step[key] for step in outputs]).cpu() for key in outputs[0]} if outputs else {}


def restored(terms: dict[str, Tensor], device: torch.device) -> Outputs:
    """What ``stored`` kept; the first process goes on with it, the others with none of it."""
    if not terms:
        return []
    return [{key: (value if rank() == 0 else value[:0]).to(device) for key, value in terms.items()}]
