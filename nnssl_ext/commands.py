"""Build nnU-Net's command lines, quoted for pasting."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

_NAME = re.compile(r"Dataset(\d{3,})_")


def dataset_word(name: str) -> str:
    """Return a data set's number, or its name if ambiguous.

    Stock nnU-Net takes every folder that begins with the number, so that 103 also finds Dataset1035_X.
    """
    match = _NAME.match(name)
    if match is None:
        return name
    roots = filter(os.path.isdir, (os.environ.get(f"nnUNet_{root}", "") for root in ("preprocessed", "raw", "results")))
    same = {path.name for root in roots for path in Path(root).glob(f"Dataset{match[1]}*")}
    return str(int(match[1])) if same <= {name} else name


def dataset_number(name: str) -> int:
    """Return the number in a data set's name.

    Raises:
        ValueError: If it has none.
    """
    match = _NAME.match(name)
    if match is None:
        raise ValueError(f"expected DatasetXXX_NAME, got '{name}'")
    return int(match[1])


def train_words(
    dataset: str, configuration: str, fold: str | int, *, plans: str = "nnUNetPlans", trainer: str = "nnUNetTrainer"
) -> list[str]:
    """Return the words of an ``nnUNetv2_train`` command.

    Args:
        dataset: Full name of the data set.
        configuration: Name of the configuration.
        fold: Number, 'all' or a placeholder.
        plans: Name of the plans.
        trainer: Name of the trainer.
    """
    words = ["nnUNetv2_train", dataset_word(dataset), configuration, str(fold)]
    words += ["-p", plans] if plans != "nnUNetPlans" else []
    return [*words, "-tr", trainer] if trainer != "nnUNetTrainer" else words


def train_command(
    dataset: str,
    configuration: str,
    fold: str | int,
    *,
    plans: str = "nnUNetPlans",
    trainer: str = "nnUNetTrainer",
    weights: str | Path | None = None,
) -> str:
    """Return an ``nnUNetv2_train`` command line."""
    words = train_words(dataset, configuration, fold, plans=plans, trainer=trainer)
    return shlex.join([*words, *(["-pretrained_weights", str(weights)] if weights is not None else [])])
