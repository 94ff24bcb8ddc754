"""The steps of a fine-tuning's epoch, and the ways in which a run ends amid them without losing one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_ext.errors import UserError
from nnssl_ext.training.distributed.ranks import world
from nnssl_ext.training.finetuning.state import Outputs, of_all_processes
from nnssl_ext.training.run import folder as run_folder
from nnssl_ext.training.run.interruption import leave

if TYPE_CHECKING:
    from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune


def training_steps(trainer: nnsslTrainer_Finetune) -> Outputs:
    """Do an epoch's remaining steps; the losses of all of them, those before an interruption included.

    Raises:
        UserError: If there is no data to go on with; all steps before are then in checkpoint_latest.pth.
        SystemExit: With status 0 when the run was asked to end; likewise.
    """
    first = trainer.current_epoch * trainer.settings.steps_per_epoch
    try:
        for _ in range(first + trainer.num_iterations_per_epoch - trainer.step):
            trainer.outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            keep_snapshot(trainer)
            leave_if_asked(trainer)
    except UserError:
        # one of several processes cannot do this alone
        if world() == 1 and trainer.step and not hopeless(trainer, trainer.outputs):
            keep_progress(trainer)
        raise
    return trainer.outputs


def leave_if_asked(trainer: nnsslTrainer_Finetune) -> None:
    """Between two steps: write a checkpoint and end the process if a signal or the time limit asks for it."""
    reason = trainer.interruption.agreed(trainer.step)
    if reason:
        leave(trainer, reason, keep_progress(trainer), trainer.settings.steps)


def leave_before_validation(trainer: nnsslTrainer_Finetune) -> None:
    """After the last step: whole cases are predicted next, amid which nothing answers a signal; ``--c`` does it."""
    reason = trainer.interruption.agreed(0)
    if reason:
        leave(trainer, reason, not trainer.disable_checkpointing, trainer.settings.steps)


def keep_progress(trainer: nnsslTrainer_Finetune) -> bool:
    """Write checkpoint_latest.pth amid an epoch; whether it was written.

    Raises:
        UserError: If the losses are not finite any more: the checkpoint that is there is better.
    """
    trainer.outputs = of_all_processes(trainer.outputs)
    finite_steps(trainer, trainer.outputs)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / run_folder.LATEST))
    return trainer.writer.wait() and not trainer.disable_checkpointing


def keep_first(trainer: nnsslTrainer_Finetune) -> None:
    """Before the first step of this process: what a run that is killed at once would not have."""
    if trainer.step == 0:
        # pretrained weights are given without --c only: continued, it would start from scratch
        trainer.save_checkpoint(str(Path(trainer.output_folder) / run_folder.LATEST))
    elif not trainer.snapshot_file(trainer.step).is_file():
        keep_snapshot(trainer)


def keep_snapshot(trainer: nnsslTrainer_Finetune) -> None:
    """Keep the weights if the settings ask for them after this step."""
    if trainer.step in trainer.settings.snapshots:
        trainer.save_checkpoint(str(trainer.snapshot_file(trainer.step)))


def finite_steps(trainer: nnsslTrainer_Finetune, outputs: Outputs) -> Outputs:
    """The steps whose loss is finite.

    Raises:
        UserError: If the others have spoilt the run.
    """
    if hopeless(trainer, outputs):
        trainer.refuse_loss(float("nan"))
    return [step for step in outputs if np.isfinite(step["loss"])]


def hopeless(trainer: nnsslTrainer_Finetune, outputs: Outputs) -> bool:
    """Whether losses of an epoch that are not finite have spoilt the weights, or are too many.

    A gradient scaler (float16) leaves such a step out, as stock nnU-Net does; otherwise the weights are not finite now.
    """
    bad = sum(not np.isfinite(step["loss"]) for step in outputs)
    return bad > 0 and (
        trainer.grad_scaler is None or bad > trainer.common.max_nonfinite_batches or bad == len(outputs)
    )
