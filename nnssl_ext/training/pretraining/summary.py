"""The summary of a finished pretraining, in the place of nnU-Net's validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nnssl_ext.commands import OCCASIONS, RunName
from nnssl_ext.data.corpus import TARGET_KEY
from nnssl_ext.methods import Readable


def summary_text(content: Mapping[str, Any], readable: Readable, learned_from: str) -> str:
    """Return the summary for the log."""
    value = content[readable.key]
    recipe = "".join(f"\n    {line}" for line in content.get("recipe_commands") or ())
    occasion = next((text for name, text in OCCASIONS if name in recipe), "")
    return (
        f"Pretraining summary\n"
        f"  {content['method']} on {content['dataset']}, {content['configuration']}, fold {content['fold']} "
        f"({learned_from}): "
        f"{content['epochs']} epochs, {content['steps']} steps of {content['batch_size']}, {content['hours']:.2f} h\n"
        f"  objective on validation crops: {content['objective_first']:.4f} -> {content['objective_last']:.4f}\n"
        f"  {readable.title}: {value['first']:.4f} -> {value['last']:.4f}\n"
        f"{_lengths_text(content)}"
        f"  fine-tune with:\n    {content['next_command'] or 'nothing: no checkpoint was written'}"
        + (f"\n  {content['replaces']}" if content.get("replaces") else "")
        + (f"\n  or, {occasion}:{recipe}" if recipe else "")
    )


def _lengths_text(content: Mapping[str, Any]) -> str:
    lengths = content.get("weight_lengths")
    if not lengths:
        return ""
    median = lengths["median"]
    if lengths["restored"]:
        return f"  convolutions before a norm are scaled to their initial lengths, from {median:.2f} times (median)\n"
    return (
        f"  convolutions before a norm have {median:.2f} times their initial length (median): relative to it, a step "
        f"of fine-tuning is {median**2:.2f} times smaller by SGD and {median:.2f} times by Adam than on fresh weights\n"
        "  to fine-tune by Adam or AdamW, first run nnssl_ext transfer with --lengths initial\n"
    )


def tuned_run(run: RunName, trainer: str, dataset_json: Mapping[str, Any]) -> RunName:
    run = replace(run, trainer=trainer)
    # a corpus has no labels and names the data set that its weights are for
    return replace(run, dataset=dataset_json[TARGET_KEY], fold="0") if TARGET_KEY in dataset_json else run
