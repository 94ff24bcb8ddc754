"""What a pretraining run writes into its checkpoint, and what must agree when it is continued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnssl_ext import checkpoint
from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.networks import adaptation_plan as contract
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.networks.base import LearnedPositions
from nnssl_ext.provenance import hardware, revision, versions
from nnssl_ext.training.pretraining import steps
from nnssl_ext.training.wrapping import lay_out_as_weights
from nnssl_ext.transfer.adaptations import positions

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer

#: Common settings that a continued run may change: they change neither the data nor a step.
FREE = (
    "save_every",
    "validation_iterations",
    "epochs",
    "images",
    "max_unreadable_fraction",
    "max_nonfinite_batches",
    "max_time",
    "on_write_failure",
    "write_in_background",
    "keep_host_memory",
)


def collect(trainer: PretrainingTrainer) -> dict[str, Any]:
    """The content of a checkpoint: nnU-Net's keys, the adaptation plan, and our own section."""
    method, scaler = trainer.method, trainer.grad_scaler
    citation = {"type": "pretraining method", "name": method.title, "apa_citations": [method.citation]}
    return {
        "network_weights": network_weights(method, trainer.data_heads),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": steps.next_epoch(trainer),
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "nnssl_adaptation_plan": adaptation_plan(trainer),
        "citations": [citation],
        "nnssl_ext": own_section(trainer),
    }


def restore(trainer: PretrainingTrainer, content: dict[str, Any], source: str) -> None:
    """Put an initialised trainer into the state a checkpoint was written in.

    Args:
        trainer: The trainer.
        content: What ``checkpoint.load`` returned.
        source: Where it is from, for messages.

    Raises:
        UserError: If the checkpoint belongs to another run.
    """
    checkpoint.refuse_older(content, source)
    own = content["nnssl_ext"]
    refuse_other_run(own["identity"], identity(trainer), source)
    refuse_other_data(own.get("data"), data(trainer), source)
    trainer.method.load_state_dict(own["state"])
    trainer.optimizer.load_state_dict(content["optimizer_state"])
    lay_out_as_weights(trainer.optimizer)
    if trainer.grad_scaler is not None and content["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(content["grad_scaler_state"])
    trainer.my_init_kwargs = content["init_args"]
    trainer.current_epoch = content["current_epoch"]
    trainer.logger.load_checkpoint(content["logging"])
    trainer._best_ema = content["_best_ema"]
    trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
    trainer.step = own["counters"]["step"]
    if trainer.step:  # a validation may come before the next step: schedules are where the last one left them
        trainer.method.before_step((trainer.step - 1) / (trainer.num_epochs * trainer.num_iterations_per_epoch))
    trainer.guard.skipped = own["counters"].get("nonfinite", 0)
    trainer.outputs = steps.restored(own.get("outputs", {}), trainer.device)


def start(trainer: PretrainingTrainer) -> None:
    """Before the first step of this process: what the method has chosen; of a run, ``start_from``, if plans say so."""
    chosen = str(trainer.method)
    if chosen != trainer.method.title:
        trainer.print_to_log_file(chosen)
    source = trainer.checked.common.start_from
    if source is not None and trainer.step == 0:
        start_from(trainer.method, Path(source))
        trainer.print_to_log_file(f"Starting from {source}")


def start_from(method: Method, path: Path) -> None:
    """Take over what a finished run of the same method has learned, heads, teacher and centres included.

    The crop may be another one: positions are resized to the network's grid.

    Raises:
        UserError: If the file is damaged, another method's, or another network's.
    """
    own = checkpoint.load(path).get("nnssl_ext", {})
    if own.get("method") != method.name:
        raise UserError(f"start_from={path} is a run of {own.get('method')}, this is {method.name}; name a run of it")
    mine, theirs = method.state_dict(), dict(own["state"])
    learned = method.backbone.learned_positions()
    for name, tensor in mine.items():
        if learned and name in theirs and name.endswith(".pos_embed") and tensor.shape == learned.table.shape:
            theirs[name] = _resized_positions(theirs[name], own.get("position_grid"), learned, path)
    wrong = sorted(k for k in {*mine, *theirs} if k not in mine or k not in theirs or mine[k].shape != theirs[k].shape)
    if wrong:
        raise UserError(
            f"start_from={path} belongs to another network or other heads: '{wrong[0]}' differs, and {len(wrong) - 1} "
            f"more tensors; plan with the same recipe"
        )
    method.load_state_dict(theirs)


def _resized_positions(table: Tensor, grid: Sequence[int] | None, learned: LearnedPositions, path: Path) -> Tensor:
    """The positions of a checkpoint's grid of tokens for the network's own."""
    number = table.shape[1] - learned.prefix
    if grid is None:  # files of earlier versions do not say it
        grid = [round(number ** (1 / 3))] * 3
    if math.prod(grid) != number:
        raise UserError(
            f"start_from={path} has {number} positions of tokens, and does not say of which grid; plan with the patch "
            f"size and position_grid that it was made with"
        )
    return table if tuple(grid) == learned.grid else positions(table, grid, learned.grid, learned.prefix)


def network_weights(method: Method, heads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The complete state dict of the data set's own network: all that was pretrained, under every alias, and fresh
    heads of the data set's width where the method trained heads of its own."""
    weights = method.exported.state_dict()
    return {**{k: v for k, v in weights.items() if not (heads and method.backbone.is_head(k))}, **heads}


def fresh_heads(network: nn.Module) -> dict[str, Tensor]:
    """The heads of a newly built network of the data set's width, under every alias."""
    backbone = backbone_of(network)
    return {k: v for k, v in network.state_dict().items() if backbone.is_head(k)}


def own_section(trainer: PretrainingTrainer) -> dict[str, Any]:
    """What stands under ``nnssl_ext``: enough to continue exactly, and to know what the weights are."""
    method, checked = trainer.method, trainer.checked
    learned = method.backbone.learned_positions()
    return {
        "format": checkpoint.FORMAT,
        "method": method.name,
        "title": method.title,
        "settings": {"common": asdict(checked.common), method.name: asdict(checked.settings)},
        "identity": identity(trainer),
        "state": method.state_dict(),
        "position_grid": list(learned.grid) if learned else None,
        # a teacher is written instead of the network, under the same names
        "trained": [name for name, p in method.network.named_parameters() if p.requires_grad],
        "counters": {
            "step": trainer.step,
            "samples": trainer.step * checked.batch_size,
            "nonfinite": trainer.guard.skipped,
        },
        "outputs": steps.stored(trainer.outputs),
        "data": data(trainer),
        "training_cases": checked.training_cases,
        "versions": versions(),
        "revision": revision(),
        "hardware": hardware(),
    }


def identity(trainer: PretrainingTrainer) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common, as JSON values."""
    method, checked, plans = trainer.method_class, trainer.checked, trainer.plans_manager.plans
    common = {k: v for k, v in asdict(checked.common).items() if k not in FREE}
    geometry = asdict(checked.geometry)
    del geometry["strides"], geometry["batch_size"]  # said elsewhere
    if not method.crops(checked.settings, checked.geometry).fits_cases:
        del geometry["case_size"]
    return _jsonlike(
        {
            "method": method.name,
            "dataset": plans["dataset_name"],
            "configuration": trainer.configuration_name,
            "fold": trainer.fold,
            "architecture": trainer.configuration_manager.configuration["architecture"],
            "geometry": geometry,
            "batch_size": checked.batch_size,
            "settings": {**common, method.name: asdict(checked.settings)},
        }
    )


def refuse_other_run(stored: dict[str, Any], mine: dict[str, Any], source: str) -> None:
    """One line about the first thing in which a checkpoint belongs to another run.

    Raises:
        UserError: If anything in ``identity`` differs.
    """
    difference = _first_difference(stored, mine, "")
    if difference:
        name, theirs, ours = difference
        raise UserError(
            f"{source} belongs to another run: {name} is {theirs!r} there and {ours!r} here; continue with the plans "
            f"it was made with, or start anew without --c"
        )


def data(trainer: PretrainingTrainer) -> dict[str, str]:
    """Digests of what the run learns from, by case; of the names alone where that is 2-D images."""
    return trainer.checked.samples.fingerprint()


def refuse_other_data(stored: dict[str, str] | None, mine: dict[str, str], source: str) -> None:
    """One line about the cases that are not what they were.

    A case that was or is left out as unreadable may differ: the log names it.

    Raises:
        UserError: If cases came, went or changed.
    """
    if stored is None:  # from before digests were kept
        return
    found = {
        "gone": [case for case in stored if case not in mine],
        "new": [case for case in mine if case not in stored],
        "changed": [case for case in mine if stored.get(case) and mine[case] and stored[case] != mine[case]],
    }
    differences = [f"{len(cases)} {what} ({shorten(cases)})" for what, cases in found.items() if cases]
    if differences:
        raise UserError(
            f"{source} was made with another state of the data set: {'; '.join(differences)}. Restore it, or start "
            f"anew without --c"
        )


def adaptation_plan(trainer: PretrainingTrainer) -> dict[str, Any]:
    """The contract by which nnU-Net's nnUNetv2_train_pretrained and nnssl read a pretrained checkpoint."""
    geometry = trainer.checked.geometry
    return contract.adaptation_plan(
        trainer.method.exported,
        plans_name=trainer.plans_manager.plans_name,
        configuration_name=trainer.configuration_name,
        configuration=trainer.configuration_manager.configuration,
        patch_size=geometry.crop_size,
        spacing=geometry.spacing,
        channels=geometry.channels,
    )


def _jsonlike(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonlike(v) for k, v in value.items()}
    return [_jsonlike(v) for v in value] if isinstance(value, (list, tuple)) else value


def _first_difference(stored: Any, mine: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(mine, dict):
        for key in [*mine, *(k for k in stored if k not in mine)]:
            found = _first_difference(stored.get(key), mine.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if stored == mine else (name, stored, mine)
