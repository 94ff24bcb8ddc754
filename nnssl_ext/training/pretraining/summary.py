"""The summary of a finished pretraining, in the place of nnU-Net's validation."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_ext.data.corpus import TARGET_KEY
from nnssl_ext.methods import Readable
from nnssl_ext.training.run.commands import RunName


def summarize(
    log: Mapping[str, Sequence[float]],
    readable: Readable,
    *,
    before: Mapping[str, Any],
    steps: int,
    batch_size: int,
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of pretraining_summary.json.

    Args:
        log: Values per epoch.
        readable: The measure that people can interpret.
        before: What comes first: the run's names.
        steps: Optimizer steps.
        batch_size: Samples per step.
        after: What comes last: the checkpoint and its use.
    """
    losses, values = log["val_losses"], log[f"val_{readable.key}"]
    # an epoch that was stopped has no end
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    return {
        **before,
        "epochs": len(losses),
        "steps": steps,
        "batch_size": batch_size,
        "hours": sum(end - start for start, end in times) / 3600,
        "objective_first": losses[0],
        "objective_last": losses[-1],
        readable.key: {"title": readable.title, "first": values[0], "last": values[-1]},
        **after,
    }


def summary_text(content: Mapping[str, Any], readable: Readable, learned_from: str) -> str:
    """Return the summary for the log."""
    value = content[readable.key]
    recipe = "".join(f"\n    {line}" for line in content.get("recipe_commands") or ())
    return (
        f"Pretraining summary\n"
        f"  {content['method']} on {content['dataset']}, {content['configuration']}, fold {content['fold']} "
        f"({learned_from}): "
        f"{content['epochs']} epochs, {content['steps']} steps of {content['batch_size']}, {content['hours']:.2f} h\n"
        f"  objective on validation crops: {content['objective_first']:.4f} -> {content['objective_last']:.4f}\n"
        f"  {readable.title}: {value['first']:.4f} -> {value['last']:.4f}\n"
        f"{_lengths_text(content)}"
        f"  fine-tune with:\n    {content['next_command'] or 'nothing: no checkpoint was written'}"
        + (f"\n  or, as suits a transformer:{recipe}" if recipe else "")
    )


def _lengths_text(content: Mapping[str, Any]) -> str:
    lengths = content.get("weight_lengths")
    if not lengths:
        return ""
    median = lengths["median"]
    if lengths["restored"]:
        return f"  convolutions before a norm are scaled to their initial lengths, from {median:.2f} times (median)\n"
    return (
        f"  convolutions before a norm have {median:.2f} times their initial length (median): an SGD step of "
        f"fine-tuning is {median**2:.2f} times smaller than on fresh weights\n"
    )


def next_command(run: RunName, target_trainer: str, dataset_json: Mapping[str, Any], file: Path) -> str:
    """Return the stock command that fine-tunes from a checkpoint.

    Args:
        run: The pretraining.
        target_trainer: Trainer of the fine-tuning.
        dataset_json: The data set's. A corpus has no labels and names the data set that its weights are for.
        file: The checkpoint.
    """
    return _tuned_run(run, target_trainer, dataset_json).fine_tuning(file)


def recipe_commands(run: RunName, recipe: str, dataset_json: Mapping[str, Any], file: Path) -> list[str]:
    """Return the commands that fine-tune with a recipe of ours.

    Args:
        run: The pretraining.
        recipe: Name of the recipe.
        dataset_json: As for ``next_command``.
        file: The checkpoint.
    """
    run = _tuned_run(run, "nnsslTrainer_Finetune", dataset_json)
    plans = f"{run.plans}_{recipe}"
    words = ["nnssl_ext", "plan", "-d", run.dataset, "-c", run.configuration, "-p", run.plans, "-o", plans, recipe]
    return [shlex.join(words), replace(run, plans=plans).fine_tuning(file)]


def _tuned_run(run: RunName, trainer: str, dataset_json: Mapping[str, Any]) -> RunName:
    run = replace(run, trainer=trainer)
    return replace(run, dataset=dataset_json[TARGET_KEY], fold="0") if TARGET_KEY in dataset_json else run
