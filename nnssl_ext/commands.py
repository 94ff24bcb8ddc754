"""Build nnU-Net's command lines, quoted for pasting."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

#: Our program that runs ``nnUNetv2_train``, as it names itself.
TRAIN = "nnssl_ext train"
#: Fine-tuning recipe and its occasion, of convolutional networks and of transformers.
OCCASIONS = (("finetune_adamw", "for a few thousand steps"), ("finetune_transformer", "as suits a transformer"))
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


def same_number(name: str) -> list[str]:
    """List other data sets that stock finds for a data set's number.

    It takes 103 for Dataset1035_X, too.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets  # imports nnU-Net

    return sorted(str(found) for found in find_candidate_datasets(dataset_number(name)) if found != name)


@dataclass(frozen=True)
class RunName:
    """Name of a run on stock's command line.

    Attributes:
        dataset: Full name of the data set.
        configuration: Configuration of the plans.
        fold: Number of the fold, ``all`` or a placeholder.
        plans: Name of the plans.
        trainer: Name of the trainer.
    """

    dataset: str
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str = "nnUNetTrainer"

    def options(self) -> list[str]:
        """Return the words for plans and trainer where they are not nnU-Net's usual ones."""
        words = ["-p", self.plans] if self.plans != "nnUNetPlans" else []
        return [*words, "-tr", self.trainer] if self.trainer != "nnUNetTrainer" else words

    def arguments(self) -> list[str]:
        """Return the words after ``nnUNetv2_train`` for this run."""
        return [dataset_word(self.dataset), self.configuration, self.fold, *self.options()]

    def words(self) -> list[str]:
        """Return the words of the command that trains this run.

        Within ``nnssl_ext train`` a trainer of ours stays with that program, which finds it by itself.
        """
        ours = sys.argv[:1] == [TRAIN] and self.trainer.startswith("nnsslTrainer")
        program = TRAIN.split() if ours else ["nnUNetv2_train"]
        return [*program, *self.arguments()]

    @property
    def folder_name(self) -> str:
        """Return the name of nnU-Net's folder of the run's folds."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    def trained(self) -> list[Path]:
        """Return the folds of this run that hold a finished training. The fold may be a placeholder."""
        folder = Path(os.environ.get("nnUNet_results", ""), self.dataset, self.folder_name)
        fold = self.fold if self.fold == "all" or self.fold.isdigit() else "*"
        return sorted(file.parent for file in folder.glob(f"fold_{fold}/checkpoint_final.pth"))

    def replaces(self) -> str:
        """Warn of models that this run would replace, '' for none. Our trainers move them aside."""
        found = [] if self.trainer.startswith("nnsslTrainer") else self.trained()
        if not found:
            return ""
        return f"note: this replaces the model in {found[0]}. To keep it, put nnUNet_results=FOLDER in front"

    def command(self, weights: str | Path | None = None) -> str:
        """Return the command that trains this run, from pretrained weights if there are some."""
        return shlex.join([*self.words(), *(["-pretrained_weights", str(weights)] if weights is not None else [])])


def recipe_commands(run: RunName, recipe: str, file: Path, longer: bool) -> list[str]:
    """Return the commands that fine-tune a pretraining's checkpoint with a recipe of ours.

    Args:
        run: Fine-tuning by a stock trainer.
        recipe: A ``finetune_*`` recipe.
        file: The checkpoint.
        longer: Whether its weights are longer than initial ones, which holds AdamW back.
    """
    tuned = replace(run, trainer="nnsslTrainer_Finetune", plans=f"{run.plans}_{recipe}")
    place = ["-d", run.dataset, "-c", run.configuration]
    commands = [["nnssl_ext", "plan", *place, "-p", run.plans, "-o", tuned.plans, recipe]]
    if recipe == "finetune_adamw":
        commands[0].append("finetune.steps=6000")
        if longer:
            shortened = file.with_name("initial_lengths.pth")
            words = ["nnssl_ext", "transfer", str(file), *place, *tuned.options(), "--lengths", "initial"]
            commands.append([*words, "-o", str(shortened)])
            file = shortened
    return [*map(shlex.join, commands), tuned.command(file)]
