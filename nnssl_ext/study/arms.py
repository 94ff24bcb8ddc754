"""Define the arms of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_ext.errors import UserError
from nnssl_ext.methods import TRAINERS
from nnssl_ext.recipe import Recipe, merged, recipes_of
from nnssl_ext.study.protocol import SCRATCH, TITLES, TOTAL

#: Stands in the plans' name of the second baseline.
RESERVED = "total"


@dataclass(frozen=True)
class Arm:
    """Describe one side of the comparison.

    Attributes:
        name: Name in the report. ``METHOD+RECIPE`` where recipes of fine-tuning are compared.
        method: Pretraining method, '' for none.
        init: File of pretrained weights from elsewhere, '' for none.
        finetune: Fine-tuning settings of the arm's own recipe, laid over the study's.
    """

    name: str
    method: str = ""
    init: str = ""
    finetune: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """Return the name of the arm for the report."""
        return TITLES.get(self.name, self.name)

    @property
    def weights_name(self) -> str:
        """Return the name of the arm's pretrained weights."""
        return self.name.partition("+")[0]

    @property
    def own_rate(self) -> float | None:
        """Return the learning rate of the arm's own recipe."""
        return self.finetune.get("learning_rate")


def arms_of(
    methods: Sequence[str],
    inits: Sequence[str],
    total_baseline: int,
    finetune: Sequence[str] = (),
    option: str = "--init: ",
) -> list[Arm]:
    """Build the arms of the command line, scratch first.

    Args:
        methods: Trainer names without ``nnsslTrainer_``.
        inits: ``NAME=FILE`` words.
        total_baseline: Paired runs of scratch with equal total steps.
        finetune: ``NAME=RECIPE[,SETTING=VALUE...]`` words. The name ``scratch`` sets the recipe of the baselines.
        option: Start of messages about ``inits``.

    Raises:
        UserError: For an unknown method or recipe, or a file that does not exist.
    """
    known = {trainer.removeprefix("nnsslTrainer_"): name for name, trainer in TRAINERS.items()}
    recipes = dict(_finetune_recipe(word) for word in finetune)
    if len({name.casefold() for name in recipes}) != len(finetune):  # they name folders
        raise UserError("--finetune: two recipes have the same name. Give each name once.")
    baseline = recipes.pop(SCRATCH, {})
    arms = []
    for name in methods:
        if name != SCRATCH and name not in known:
            raise UserError(f"--methods: unknown method '{name}'. Known: scratch, {', '.join(known)}.")
        if name != SCRATCH:
            arms.append(Arm(name, method=known[name]))
    for word in inits:
        name, _, file = word.partition("=")
        if not file or not Path(file).is_file():
            raise UserError(f"{option}expected NAME=FILE with a file that exists, got '{word}'.")
        if not _is_name(name) or name in known or name.casefold() in (SCRATCH, TOTAL):
            raise UserError(
                f"{option}expected a name of letters, digits, - and _ that is neither {SCRATCH} nor a method, got "
                f"'{word}'."
            )
        arms.append(Arm(name, init=str(Path(file).resolve())))
    if recipes:
        arms = [
            replace(arm, name=f"{arm.name}+{name}", finetune=settings)
            for arm in arms
            for name, settings in recipes.items()
        ]
    arms.insert(0, Arm(SCRATCH, finetune=baseline))
    if len({arm.name.casefold() for arm in arms}) != len(arms):
        raise UserError("Two arms have the same name. Give each name once.")
    if total_baseline and any(arm.method for arm in arms):
        arms.append(Arm(TOTAL, finetune=baseline))
    return arms


def _finetune_recipe(word: str) -> tuple[str, dict[str, Any]]:
    """Read one ``NAME=RECIPE[,SETTING=VALUE...]`` into a name and fine-tuning settings."""
    name, _, rest = word.partition("=")
    if not rest or not _is_name(name):
        raise UserError(f"--finetune: expected NAME=RECIPE, got '{word}'.")
    if name == RESERVED:
        raise UserError(f"--finetune: expected a name other than {RESERVED}, got '{word}'.")
    settings: dict[str, Any] = {}
    for recipe in recipes_of(rest.split(",")):
        _refuse_other_parts(recipe, word)
        settings = merged(settings, recipe.settings.get("finetune", {}))
    for setting in ("steps", "snapshots", "seed"):
        if setting in settings:
            raise UserError(f"--finetune {word}: finetune.{setting} belongs to the study. Use its own option.")
    return name, settings


def _refuse_other_parts(recipe: Recipe, word: str) -> None:
    """Raise where a recipe changes more than the fine-tuning."""
    others = [name for name in recipe.settings if name != "finetune"]
    others += [name for name in ("configuration", "architecture") if recipe.parts()[name]]
    if others:
        raise UserError(
            f"--finetune {word}: expected fine-tuning settings only, got {', '.join(others)}. Write "
            f"finetune.SETTING=VALUE. Other settings stand at the end of the command and hold for all arms."
        )


def _is_name(name: str) -> bool:
    return name.replace("_", "").replace("-", "").isalnum()
