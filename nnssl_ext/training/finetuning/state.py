"""Collect losses over processes and judge them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from nnssl_ext.errors import UserError
from nnssl_ext.settings import FinetuneSettings
from nnssl_ext.training.distributed.ranks import world

#: What stock collects of an epoch's steps: {"loss": scalar} per step.
Outputs = list[dict[str, np.ndarray]]
SPOILT = (
    "the {} became nan in epoch {}. The checkpoints of earlier epochs are intact. Lower finetune.learning_rate "
    "(now {}) and start anew"
)
#: Settings that a continued run may change: they change neither the data nor a step.
FREE = ("validation_iterations", "save_every", "mirroring")


def on_host(outputs: list[dict[str, Any]]) -> Outputs:
    """Fetch the losses that are still on a GPU, in one go."""
    waiting = [place for place, step in enumerate(outputs) if isinstance(step["loss"], torch.Tensor)]
    if waiting:
        losses = torch.stack([outputs[place]["loss"] for place in waiting]).cpu().numpy()
        for place, loss in zip(waiting, losses, strict=True):
            outputs[place] = {"loss": np.array(loss)}  # stock takes a bare scalar for something else
    return outputs


def of_all_processes(outputs: Outputs) -> Outputs:
    """Average each step's loss over the processes."""
    if world() == 1:
        return outputs
    everyone: list[list[float]] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, [float(step["loss"]) for step in outputs])
    return [{"loss": np.array(math.fsum(losses) / world(), np.float32)} for losses in zip(*everyone, strict=True)]


def finite(outputs: Outputs) -> Outputs:
    """Return the steps whose loss is finite."""
    return [step for step in outputs if np.isfinite(step["loss"])]


def is_spoilt(outputs: Outputs, scaled: bool, limit: int) -> bool:
    """Check whether non-finite losses have spoilt the run.

    Args:
        outputs: Steps of an epoch.
        scaled: Whether a gradient scaler (float16) skips such steps, as in stock nnU-Net. Without one the weights are
            not finite after them.
        limit: Steps that may be skipped.
    """
    bad = len(outputs) - len(finite(outputs))
    return bad > 0 and (not scaled or bad > limit or bad == len(outputs))


def refuse_nonfinite(network: nn.Module, step: int, epoch: int, rate: float) -> None:
    """Refuse to keep weights that are not finite. A gradient may overflow where the loss does not."""
    if not all(bool(torch.isfinite(weights).all()) for weights in network.parameters()):
        raise UserError(SPOILT.format("gradient", epoch, rate) if step else "the weights to start from are not finite")


def refuse_other_run(content: Mapping[str, Any], settings: Mapping[str, Any], fold: int | str, source: str) -> None:
    """Refuse to continue another run's checkpoint, or a snapshot."""
    own = content["nnssl_ext"]
    # what a later version added has its default there
    stored = {**vars(FinetuneSettings()), **own["finetune"]} if "finetune" in own else {}
    differing = [name for name, value in settings.items() if name not in FREE and stored.get(name) != value]
    reasons = [f"other finetune settings ({', '.join(differing)})"] if differing else []
    reasons += ["another fold"] if str(own.get("fold")) != str(fold) else []
    if reasons:
        raise UserError(
            f"{source} belongs to a run with {' and '.join(reasons)}. Continue it with its own plans, or start anew "
            f"without --c"
        )
    if "optimizer_state" not in content:
        raise UserError(f"{source} is a snapshot: it holds weights only, and no run goes on from it")
