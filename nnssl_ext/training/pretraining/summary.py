"""What a finished pretraining tells its user, in place of nnU-Net's validation."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.commands import train_words
from nnssl_ext.data.corpus import TARGET_KEY
from nnssl_ext.environment import launched
from nnssl_ext.recipe import write_json
from nnssl_ext.training.distributed.ranks import world

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
    from nnssl_ext.training.run.folder import Training


def print_summary(trainer: PretrainingTrainer) -> dict[str, Any]:
    """Print and log the summary and write it as pretraining_summary.json; returns its content."""
    log = trainer.logger.get_value
    readable = trainer.method.readable
    numbers = log(f"val_{readable.key}", None)
    losses = log("val_losses", None)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    start, end = log("epoch_start_timestamps", None), log("epoch_end_timestamps", None)
    content = {
        "method": trainer.method.title,
        "dataset": trainer.plans_manager.dataset_name,
        "plans": trainer.plans_manager.plans_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "training_cases": trainer.checked.training_cases,
        "epochs": len(losses),
        "steps": trainer.step,
        "batch_size": trainer.checked.batch_size,
        "hours": sum(b - a for a, b in zip(start, end, strict=True)) / 3600,
        "objective_first": losses[0],
        "objective_last": losses[-1],
        readable.key: {"title": readable.title, "first": numbers[0], "last": numbers[-1]},
        "checkpoint": str(file) if file.is_file() else None,
        "next_command": next_command(trainer, file) if file.is_file() else None,
    }
    write_json(content, Path(trainer.output_folder) / "pretraining_summary.json")
    trainer.print_to_log_file(
        f"Pretraining summary\n"
        f"  {content['method']} on {content['dataset']}, {content['configuration']}, fold {content['fold']} "
        f"({trainer.checked.samples.summary(trainer.checked.training_cases)}): "
        f"{content['epochs']} epochs, {content['steps']} steps of {content['batch_size']}, {content['hours']:.2f} h\n"
        f"  objective on validation crops: {losses[0]:.4f} -> {losses[-1]:.4f}\n"
        f"  {readable.title}: {numbers[0]:.4f} -> {numbers[-1]:.4f}\n"
        f"  fine-tune with:\n    {content['next_command'] or 'nothing: no checkpoint was written'}",
        add_timestamp=False,
    )
    return content


def next_command(trainer: PretrainingTrainer, file: Path) -> str:
    """The stock command that fine-tunes from these weights."""
    dataset, fold = trainer.plans_manager.dataset_name, str(trainer.fold)
    if TARGET_KEY in trainer.dataset_json:  # a corpus has no labels: its weights are for another data set
        dataset, fold = trainer.dataset_json[TARGET_KEY], "0"
    words = _command(trainer, dataset, fold, trainer.checked.common.target_trainer)
    return shlex.join([*words, "-pretrained_weights", str(file)])


def continue_command(trainer: Training) -> str:
    """The command that goes on with this run."""
    words = _command(trainer, trainer.plans_manager.dataset_name, str(trainer.fold), type(trainer).__name__)
    if trainer.device.type != "cuda":
        words += ["-device", trainer.device.type]
    if world() > 1 and launched():
        words[:1] = _launcher()
    elif world() > 1:
        words += ["-num_gpus", str(world())]
    return shlex.join([*words, "--c"])


def _launcher() -> list[str]:
    """How torchrun starts as many processes again."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    several = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"] if here < world() else ["--standalone"]
    sizes = [f"--nnodes={world() // here}", f"--nproc-per-node={here}"]
    return ["torchrun", *several, *sizes, "-m", "nnssl_ext.train"]


def _command(trainer: Training, dataset: str, fold: str, trainer_name: str) -> list[str]:
    plans = trainer.plans_manager.plans_name
    return train_words(dataset, trainer.configuration_name, fold, plans=plans, trainer=trainer_name)
