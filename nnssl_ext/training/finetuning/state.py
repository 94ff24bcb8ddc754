"""What a fine-tuning writes into its checkpoints, and how it goes on from one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.provenance import revision, versions
from nnssl_ext.training.distributed.ranks import world
from nnssl_ext.training.finetuning.components import moving_average

if TYPE_CHECKING:
    from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune

#: What stock collects of an epoch's steps: {"loss": scalar} a step.
Outputs = list[dict[str, np.ndarray]]


def collect(trainer: nnsslTrainer_Finetune, complete: bool = True) -> dict[str, Any]:
    """The content of a checkpoint: nnU-Net's keys and our own section.

    Args:
        trainer: The trainer, between two steps.
        complete: With all that is needed to go on; without, what is needed to predict.
    """
    content = {
        "network_weights": trainer.exported_weights(),
        "trainer_name": trainer.predicted_by,
        "init_args": trainer.my_init_kwargs,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "current_epoch": next_epoch(trainer),
        "nnssl_ext": {
            "format": checkpoint.FORMAT,
            "finetune": vars(trainer.settings),
            "fold": trainer.fold,
            "step": trainer.step,
            "losses": [float(step["loss"]) for step in trainer.outputs],
            "versions": versions(),
            "revision": revision(),
        },
    }
    if complete:
        scaler = trainer.grad_scaler
        content |= {
            "optimizer_state": trainer.optimizer.state_dict(),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": trainer.logger.get_checkpoint(),
            "_best_ema": trainer._best_ema,
        }
        if trainer.averaged is not None:
            content["nnssl_ext"]["trained_weights"] = trainer.plain_network.state_dict()
    return content


def next_epoch(trainer: nnsslTrainer_Finetune) -> int:
    """The epoch that a run goes on with: this one if its steps or their evaluation are not done."""
    per_epoch, last = trainer.settings.steps_per_epoch, trainer.settings.steps
    done = trainer.step >= min((trainer.current_epoch + 1) * per_epoch, last) and not trainer.outputs
    return trainer.current_epoch + int(done)


def restore(trainer: nnsslTrainer_Finetune, content: dict[str, Any], source: str) -> None:
    """Put a trainer into the state a checkpoint was written in.

    Args:
        trainer: The trainer; initialised here if it is not.
        content: What ``checkpoint.load`` returned.
        source: Where it is from, for messages.

    Raises:
        UserError: If the checkpoint belongs to another run, or cannot be gone on from.
    """
    checkpoint.refuse_older(content, source)
    own = content["nnssl_ext"]
    if own.get("finetune") != vars(trainer.settings) or str(own.get("fold")) != str(trainer.fold):
        raise UserError(
            f"{trainer.output_folder} holds a run with other finetune settings or another fold; continue it with its "
            f"own plans, or start anew without --c"
        )
    if "optimizer_state" not in content:
        raise UserError(f"{source} is a snapshot: it holds weights only, and no run goes on from it")
    if not trainer.was_initialized:
        trainer.initialize()
    try:
        _restore_weights(trainer, content)
    except RuntimeError as error:  # torch lists every tensor
        raise UserError(
            f"{source} belongs to another network than the plans build; continue it with its own plans, or start anew "
            f"without --c"
        ) from error
    trainer.optimizer.load_state_dict(content["optimizer_state"])
    if trainer.grad_scaler is not None and content["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(content["grad_scaler_state"])
    trainer.my_init_kwargs = content["init_args"]
    trainer.current_epoch, trainer.step = content["current_epoch"], own["step"]
    # nnU-Net's log takes an epoch's values once: those of an epoch that goes on are logged again
    log = {key: values[: trainer.current_epoch] for key, values in content["logging"].items()}
    trainer.logger.load_checkpoint(log)
    trainer._best_ema = content["_best_ema"]
    trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
    trainer.outputs = [{"loss": np.array(loss, np.float32)} for loss in own.get("losses", [])]


def _restore_weights(trainer: nnsslTrainer_Finetune, content: dict[str, Any]) -> None:
    own = content["nnssl_ext"]
    trainer.plain_network.load_state_dict(own.get("trained_weights", content["network_weights"]))
    if "trained_weights" in own:
        trainer.averaged = moving_average(trainer.plain_network, trainer.settings.weight_average_decay)
        trainer.averaged.module.load_state_dict(content["network_weights"])
        trainer.averaged.n_averaged.fill_(own["step"])


def of_all_processes(outputs: Outputs) -> Outputs:
    """An epoch's losses so far, each the mean over the processes: what the epoch's mean is made of."""
    if world() == 1:
        return outputs
    everyone: list[list[float]] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, [float(step["loss"]) for step in outputs])
    return [{"loss": np.array(math.fsum(losses) / world(), np.float32)} for losses in zip(*everyone, strict=True)]
