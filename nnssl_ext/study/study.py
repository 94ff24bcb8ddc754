"""A label-efficiency study, from the command line's words to its report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl_ext.configurations import configuration_of
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import find_trainer, trainer_folders
from nnssl_ext.files import file_digest, lock_file, replaced_on_success
from nnssl_ext.methods import METHODS, SCHEMAS
from nnssl_ext.networks.target import check_stock_weights
from nnssl_ext.recipe import Recipe, assignments_recipe, derive_plans, load_recipe, read_json, write_json
from nnssl_ext.settings import PLANS_KEY, FinetuneSettings, split_sections
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.grid import FINETUNER, Grid
from nnssl_ext.study.protocol import Protocol, draw_cases, keep_protocol
from nnssl_ext.training.checks import check_plans
from nnssl_ext.training.finetuning.components import finetune_settings


def recipes_of(overlays: Sequence[str]) -> list[Recipe]:
    """The command line's recipes and settings, their names and types checked.

    Raises:
        UserError: For an unknown one.
    """
    recipes = [assignments_recipe([word]) if "=" in word else load_recipe(word) for word in overlays]
    for recipe in recipes:
        split_sections(recipe.settings, SCHEMAS, recipe.name)
    return recipes


def optimiser_of(source: Path, plans: str, configuration: str, overlays: Sequence[str]) -> str:
    """The fine-tuner's optimiser, as a data set's plans and what is laid over them say."""
    derived = derive_plans(read_json(source / f"{plans}.json"), plans, recipes_of(overlays), [configuration])
    _, sections = split_sections(derived.get(PLANS_KEY, {}), SCHEMAS, f"plans {plans}")
    settings: FinetuneSettings = sections["finetune"]
    return settings.optimizer


@dataclass
class Study:
    """One study; ``prepare`` it, then run its grid.

    Args:
        folder: All of it goes there.
        protocol: What defines it.
        arms: What is compared; scratch first.
        device: ``cpu`` or ``cuda``.
        keep_checkpoints: Keep the checkpoints of fine-tunings, which nobody reads again.
        finetuner: The trainer of every arm.
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
        """Check everything, then write the protocol (with ``keep``), the links, the plans and the splits.

        Raises:
            UserError: One line about the first thing that cannot work; nothing is written then.
        """
        plans = self._checked_plans()
        held_out, pool = held_out_and_pool(self.source, self._data, self.protocol.fold)
        cases = draw_cases(self.protocol, held_out, pool, classes_of(self._data, pool))
        grid = Grid(self.folder, self.protocol, cases, self.arms, self.device, self.keep_checkpoints, self.finetuner)
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_protocol(self.protocol, self.folder / "study.json", keep)
        keep_files(self.arms, self.folder, keep)
        keep_inputs(
            {
                "cases that are held out": digest_of(sorted(held_out)),
                "cases to train on": digest_of(sorted(pool)),
                "labels and channels": digest_of(read_json(self.source / "dataset.json")),
                "plans, with this study's settings": digest_of(plans),
                "label maps or preprocessed cases": self._digest_of_cases([*held_out, *pool]),
            },
            self.folder / "inputs.json",
            keep,
        )
        grid.preprocessed.mkdir(parents=True, exist_ok=True)
        for name in (self._data.name, "gt_segmentations"):
            link = grid.preprocessed / name
            if not link.is_symlink():
                link.symlink_to((self.source / name).resolve(), target_is_directory=True)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            write_json(read_json(self.source / name), grid.preprocessed / name)
        write_json(grid.folds, grid.preprocessed / "splits_final.json")
        write_json(plans, grid.preprocessed / f"{plans['plans_name']}.json")
        return grid

    def _digest_of_cases(self, cases: Sequence[str]) -> str:
        """Of the label maps' bytes and of the sizes of the preprocessed files.

        Raises:
            UserError: If one is missing.
        """
        ending, found = read_json(self.source / "dataset.json")["file_ending"], {}
        files: dict[str, list[tuple[str, int]]] = {}  # by name without its ending: the case, or the case and _seg
        for file in sorted(self._data.iterdir()):
            files.setdefault(file.name.rpartition(".")[0], []).append((file.name, file.stat().st_size))
        for case in sorted(cases):
            truth = self.source / "gt_segmentations" / f"{case}{ending}"
            own = [*files.get(case, []), *files.get(f"{case}_seg", [])]
            if not truth.is_file() or not own:
                what = f"label map {truth}" if own else f"preprocessed case {self._data / case}"
                raise UserError(f"there is no {what}; preprocess {self.source.name} again")
            found[case] = [file_digest(truth), *own]
        return digest_of(found)

    @property
    def _data(self) -> Path:
        return data_folder(self.source, self.protocol.plans, self.protocol.configuration)

    def _checked_plans(self) -> dict:
        p = self.protocol
        plans = read_json(self.source / f"{p.plans}.json")
        recipes = recipes_of(p.overlays)
        for recipe in recipes:
            for name in ("steps", "snapshots", "learning_rate", "seed"):
                if name in recipe.settings.get("finetune", {}):
                    raise UserError(f"{recipe.name}: finetune.{name} is the study's own; it has an option for it")
            if "seed" in recipe.settings:
                raise UserError(f"{recipe.name}: seed is the study's own; use --seed")
        derived = derive_plans(plans, f"{p.plans}_study", recipes, [p.configuration])
        if derived.get(PLANS_KEY, {}).get("start_from"):
            raise UserError(
                "start_from: a study's pretraining starts from nothing, since it could not know which images those "
                "weights have seen; compare a finished pretraining with --init NAME=FILE"
            )
        derived[PLANS_KEY] = {**derived.get(PLANS_KEY, {}), "seed": p.seed}
        dataset_json = read_json(self.source / "dataset.json")
        for arm in self.arms:
            if arm.method:
                check_plans(METHODS[arm.method], derived, p.configuration, dataset_json)
            if arm.init:
                os.environ["nnUNet_extTrainer"] = trainer_folders()
                trainer = find_trainer(self.finetuner)
                check_stock_weights(Path(arm.init), trainer, derived, p.configuration, dataset_json)
        own = {"steps": p.steps, "snapshots": p.snapshots}
        section = derived.get(PLANS_KEY, {})
        finetune_settings({**derived, PLANS_KEY: {**section, "finetune": {**section.get("finetune", {}), **own}}})
        return derived


def keep_files(arms: Sequence[Arm], folder: Path, keep: bool) -> None:
    """Keep copies of the arms' files and note their sha256, or check that they are those that were noted.

    Raises:
        UserError: If an arm's file is another one than its runs were started from.
    """
    path = folder / "init.json"
    noted = read_json(path) if path.is_file() else {}
    for arm in arms:
        if not arm.init:
            continue
        copy = folder / "init" / f"{arm.name}.pth"
        digest = file_digest(Path(arm.init))
        if noted.setdefault(arm.name, digest) != digest:
            raise UserError(
                f"--init {arm.name}={arm.init} is another file than the one that {folder} knows by this name; "
                f"give it another name"
            )
        if keep and not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replaced_on_success(copy) as temporary:
                shutil.copyfile(arm.init, temporary)
                if file_digest(temporary) != digest:
                    raise UserError(f"--init {arm.name}={arm.init} changed while it was copied; call it again")
    if keep and noted:
        write_json(noted, path)


def keep_inputs(inputs: dict[str, str], path: Path, keep: bool) -> None:
    """Note the digests of what all runs share, or check that they are those that were noted.

    Raises:
        UserError: If one of them has changed since the study began.
    """
    noted = read_json(path) if path.is_file() else {}
    for name, digest in inputs.items():
        if noted.setdefault(name, digest) != digest:
            raise UserError(
                f"the study in {path.parent} was begun with other {name}; its runs would not be comparable with new "
                f"ones. Give another -o, or put them back"
            )
    if keep:
        write_json(noted, path)


def digest_of(content: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_folder(source: Path, plans: str, configuration: str) -> Path:
    """The preprocessed cases of a data set's plans and configuration.

    Raises:
        UserError: If there are no such plans or configuration.
    """
    file = source / f"{plans}.json"
    if not file.is_file():
        raise UserError(f"{source.name} has no plans '{plans}'; plan it first, or name others with -p")
    content = read_json(file)
    return source / configuration_of(content, configuration)["data_identifier"]


def pool_size(dataset: str, plans: str, configuration: str, fold: int) -> int:
    """How many labelled cases of a data set are not held out: what ``all`` labels are."""
    source = dataset_folder(dataset)
    data = data_folder(source, plans, configuration)
    _, pool = held_out_and_pool(source, data, fold)
    if "ignore" not in read_json(source / "dataset.json")["labels"]:
        return len(pool)
    return len(classes_of(data, pool))


def held_out_and_pool(source: Path, data: Path, fold: int) -> tuple[list[str], list[str]]:
    """The validation and training cases of a data set's fold, as nnU-Net splits it; nothing is written.

    Raises:
        UserError: If there is no such fold or data.
    """
    if not data.is_dir():
        raise UserError(f"no preprocessed data in {data}; run nnUNetv2_preprocess or nnUNetv2_plan_and_preprocess")
    file = source / "splits_final.json"
    if file.is_file():
        splits = read_json(file, list)
    else:
        cases = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
        splits = generate_crossval_split(list(np.sort(cases)), seed=12345, n_splits=5)
    if not 0 <= fold < len(splits):
        raise UserError(f"--fold {fold}: {source.name} has the folds 0 to {len(splits) - 1}")
    held_out, pool = ([str(case) for case in splits[fold][part]] for part in ("val", "train"))
    shared = set(held_out) & set(pool)
    if shared or not held_out:
        raise UserError(
            f"fold {fold} of {source.name} holds out {len(held_out)} cases, {len(shared)} of them trained on"
        )
    return held_out, pool


def classes_of(data: Path, cases: Sequence[str]) -> dict[str, set]:
    """For each labelled case the classes it shows, as nnU-Net's preprocessing noted them.

    A case with nothing but the ignore label is none.
    """
    dataset = infer_dataset_class(str(data))(str(data), list(cases))
    found = {}
    for case in cases:
        try:
            _, _, _, properties = dataset.load_case(case)
        except Exception as error:  # damaged files raise anything
            raise UserError(f"case '{case}' in {data} cannot be read ({error}); preprocess it again") from error
        places = dict(properties["class_locations"])
        # of data sets with an ignore label nnU-Net notes what is annotated, under -1 and all labels
        annotated = [places.pop(name) for name in list(places) if isinstance(name, tuple) and -1 in name]
        if not annotated or len(annotated[0]):
            found[case] = {name for name, voxels in places.items() if len(voxels)}
    return found


def locked(folder: Path) -> FileLock:
    """A lock on a study's folder, released when this process ends, however it ends.

    Raises:
        UserError: If another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return lock_file(folder / ".lock", f"the study in {os.fspath(folder)}")
