"""Build a study's grid from its protocol."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_ext.configurations import configuration_of, unusable
from nnssl_ext.data.cases import stored_as
from nnssl_ext.data.index import copy_index
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import find_trainer, trainer_folders
from nnssl_ext.files import link, lock_file
from nnssl_ext.methods import METHODS, SCHEMAS
from nnssl_ext.networks.target import check_stock_weights
from nnssl_ext.recipe import Recipe, derive_plans, read_json, recipes_of, write_json
from nnssl_ext.settings import PLANS_KEY, FinetuneSettings, split_sections
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.corpus import PretrainingData, pretraining_data, write_pretraining_data
from nnssl_ext.study.grid import FINETUNER, Grid
from nnssl_ext.study.inputs import (
    classes_of,
    data_folder,
    digest_of,
    digest_of_cases,
    held_out_and_pool,
    keep_files,
    keep_inputs,
    without_duplicates,
)
from nnssl_ext.study.protocol import Protocol, draw_cases, keep_protocol
from nnssl_ext.training.checks import check_plans
from nnssl_ext.training.finetuning.components import finetune_settings
from nnssl_ext.transfer.heads import output_names


def checked_recipes(overlays: Sequence[str]) -> list[Recipe]:
    """Read and check recipes and settings.

    Raises:
        UserError: For an unknown one.
    """
    recipes = recipes_of(overlays)
    for recipe in recipes:
        split_sections(recipe.settings, SCHEMAS, recipe.name)
    return recipes


def optimizer_of(source: Path, plans: str, configuration: str, overlays: Sequence[str]) -> str:
    """Return the fine-tuner's optimizer of plans with overlays."""
    derived = derive_plans(read_json(source / f"{plans}.json"), plans, checked_recipes(overlays), [configuration])
    _, sections = split_sections(derived.get(PLANS_KEY, {}), SCHEMAS, f"plans {plans}")
    settings: FinetuneSettings = sections["finetune"]
    return settings.optimizer


@dataclass
class Study:
    """Check a study and prepare its grid.

    Args:
        folder: Holds everything that the study writes.
        arms: Its arms, scratch first.
        device: ``cpu`` or ``cuda``.
        finetuner: Trainer of every arm.
    """

    folder: Path
    protocol: Protocol
    arms: list[Arm]
    device: str = "cpu"
    keep_checkpoints: bool = False
    finetuner: str = FINETUNER
    source: Path = field(init=False)

    def __post_init__(self) -> None:
        self.source = dataset_folder(self.protocol.dataset)

    def prepare(self, keep: bool = True) -> Grid:
        """Check everything, then write protocol, links and plans.

        Raises:
            UserError: For the first thing that cannot work. Nothing is written then.
        """
        p, plans = self.protocol, self._checked_plans()
        held_out, pool = held_out_and_pool(self.source, self._data, p.fold, p.group_by)
        pool, duplicates = without_duplicates(self._data, pool, held_out, p.group_by)
        drawn = draw_cases(p, held_out, pool, classes_of(self._data, pool), self._primary_class(held_out))
        cases = replace(drawn, duplicates=duplicates)
        corpus = self._corpus(held_out)
        grid = Grid(self.folder, self.protocol, cases, self.arms, self.device, self.keep_checkpoints, self.finetuner)
        inputs = {
            "held-out cases": digest_of(sorted(held_out)),
            "training cases": digest_of(sorted(pool)),
            "labels or channels": digest_of(read_json(self.source / "dataset.json")),
            "plans or settings": digest_of(plans),
            "label maps or preprocessed cases": digest_of_cases(self.source, self._data, [*held_out, *pool]),
        }
        if corpus:
            inputs["images to pretrain on"] = digest_of(corpus.kept)
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_protocol(self.protocol, self.folder / "study.json", keep)
        keep_files(self.arms, self.folder, keep)
        keep_inputs(inputs, self.folder / "inputs.json", keep)
        if keep and any(self._data.glob("*.npz")):  # once, before several runs do it at a time
            stored_as(self._data).unpack_dataset(str(self._data), num_processes=1)
        grid.preprocessed.mkdir(parents=True, exist_ok=True)
        for name in (self._data.name, "gt_segmentations"):
            link(grid.preprocessed / name, self.source / name)
        copy_index(self._data, grid.preprocessed)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            write_json(read_json(self.source / name), grid.preprocessed / name)
        write_json(grid.folds, grid.preprocessed / "splits_final.json")
        write_json(plans, grid.preprocessed / f"{plans['plans_name']}.json")
        if corpus:
            write_pretraining_data(corpus, grid.preprocessed.parent / corpus.name, plans)
        return grid

    def _corpus(self, held_out: Sequence[str]) -> PretrainingData | None:
        p = self.protocol
        if not p.pretrain_on:
            return None
        return pretraining_data(p.pretrain_on, self.source, p.plans, p.configuration, held_out)

    @property
    def _data(self) -> Path:
        return data_folder(self.source, self.protocol.plans, self.protocol.configuration)

    def _checked_plans(self) -> dict:
        p = self.protocol
        plans = read_json(self.source / f"{p.plans}.json")
        recipes = checked_recipes(p.overlays)
        for recipe in recipes:
            for name in ("steps", "snapshots", "learning_rate", "seed"):
                if name in recipe.settings.get("finetune", {}):
                    raise UserError(f"{recipe.name}: finetune.{name} belongs to the study. Use its own option.")
            if "seed" in recipe.settings:
                raise UserError(f"{recipe.name}: seed belongs to the study. Use --seed.")
            if "max_time" in recipe.settings:
                raise UserError(f"{recipe.name}: max_time would end runs early. Stop the study instead; it can go on.")
        derived = derive_plans(plans, f"{p.plans}_study", recipes, [p.configuration])
        if derived.get(PLANS_KEY, {}).get("start_from") and any(arm.method for arm in self.arms):
            raise UserError(
                "start_from: a study's pretraining starts from random weights, since others may have seen held-out "
                "images. Compare a finished pretraining with --init NAME=FILE."
            )
        derived.get(PLANS_KEY, {}).pop("max_time", None)  # a run that leaves early counts as failed
        chosen = configuration_of(derived, p.configuration)
        if reason := unusable(p.configuration, chosen, "study", flat=True):
            raise UserError(reason)
        if chosen.get("next_stage"):  # stock would predict for it, with mirroring, and read its data
            derived["configurations"][p.configuration] = {**chosen, "next_stage": None}
        derived[PLANS_KEY] = {**derived.get(PLANS_KEY, {}), "seed": p.seed}
        dataset_json = read_json(self.source / "dataset.json")
        for arm in self.arms:
            if arm.method:
                check_plans(METHODS[arm.method], derived, p.configuration, dataset_json)
            if arm.init:
                os.environ["nnUNet_extTrainer"] = trainer_folders()
                trainer = find_trainer(self.finetuner)
                _check_init(Path(arm.init), trainer, p, plans, derived, dataset_json)
        own = {"steps": p.steps, "snapshots": p.snapshots}
        section = derived.get(PLANS_KEY, {})
        for arm in self.arms:
            finetune = {**section.get("finetune", {}), **arm.finetune, **own}
            finetune_settings({**derived, PLANS_KEY: {**section, "finetune": finetune}})
        classes = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
        if p.primary_class and p.primary_class not in classes:
            raise UserError(f"--primary-class: expected one of {', '.join(classes)}, got '{p.primary_class}'.")
        return derived

    def _primary_class(self, held_out: Sequence[str]) -> int | tuple[int, ...] | None:
        """Return the label or region of the endpoint's class, None for the mean over classes.

        Raises:
            UserError: If no held-out case shows it.
        """
        name = self.protocol.primary_class
        if not name:
            return None
        dataset_json = read_json(self.source / "dataset.json")
        _, regions = output_names(dataset_json)
        labels = dataset_json["labels"][name]
        values = tuple(map(int, labels)) if isinstance(labels, list) else (int(labels),)
        # a list of one label is a region only beside others
        key: int | tuple[int, ...] = values if regions and isinstance(labels, list) else values[0]
        if not any(key in shown for shown in classes_of(self._data, held_out).values()):
            raise UserError(
                f"--primary-class {name}: expected it in a held-out case of {self.source.name}, found it in none. "
                f"Take another --fold or class."
            )
        return key


def locked(folder: Path) -> AbstractContextManager[Any]:
    """Lock a study's folder until this process ends.

    Raises:
        UserError: If another process holds the lock.
    """
    return lock_file(folder / ".lock", f"the study in {os.fspath(folder)}")


def _check_init(file: Path, trainer_class: Any, p: Protocol, plans: dict, derived: dict, dataset_json: dict) -> None:
    """Refuse weights that do not fit. The advice is about plans that the user has, or how to make them."""
    architectures = [configuration_of(own, p.configuration)["architecture"] for own in (plans, derived)]
    if architectures[0] == architectures[1]:
        check_stock_weights(file, trainer_class, {**derived, "plans_name": p.plans}, p.configuration, dataset_json)
        return
    try:
        check_stock_weights(file, trainer_class, derived, p.configuration, dataset_json)
    except UserError as error:
        words = ["nnssl_ext", "plan", "-d", p.dataset, "-p", p.plans, "-o", derived["plans_name"], *p.overlays]
        raise UserError(f"{error.line}. Before that, write its plans: {shlex.join(words)}") from error
