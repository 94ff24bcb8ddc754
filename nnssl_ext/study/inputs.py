"""Read a study's inputs and detect their changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl_ext.configurations import configuration_of
from nnssl_ext.data.cases import stored_as
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.files import file_digest, replaced_on_success
from nnssl_ext.foreign import nifti_problem
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.duplicates import find_duplicates
from nnssl_ext.study.protocol import SCRATCH, grouped

#: Folds of a data set without a split of its own, as in nnU-Net.
FOLDS = 5


def keep_files(arms: Sequence[Arm], folder: Path, keep: bool) -> None:
    """Copy the arms' files, or compare their digests.

    Raises:
        UserError: If an arm's file or recipe is another one than its runs started from.
    """
    path = folder / "init.json"
    noted = read_json(path) if path.is_file() else {}
    for arm in arms:
        if arm.finetune or arm.name == SCRATCH:
            recipe = f"the recipe of {arm.name}"
            # before 0.2 a baseline without a recipe was not noted
            before: dict = {} if any((folder / "runs" / arm.name).glob("*.csv")) else arm.finetune
            if noted.setdefault(recipe, digest_of(before)) != digest_of(arm.finetune):
                raise UserError(f"--finetune: {recipe} has changed since {folder} was begun. Give it another name.")
        if not arm.init:
            continue
        copy = folder / "init" / f"{arm.weights_name}.pth"
        digest = file_digest(Path(arm.init))
        if noted.setdefault(arm.weights_name, digest) != digest:
            raise UserError(
                f"--init {arm.weights_name}={arm.init} is another file than the one that {folder} knows by this name. "
                f"Give it another name."
            )
        if keep and not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replaced_on_success(copy) as temporary:
                shutil.copyfile(arm.init, temporary)
                if file_digest(temporary) != digest:
                    raise UserError(f"--init {arm.weights_name}={arm.init} changed while it was copied. Call it again.")
    if keep and noted:
        write_json(noted, path)


def keep_inputs(inputs: dict[str, str], path: Path, keep: bool) -> None:
    """Note the digests of shared inputs, or compare them.

    Raises:
        UserError: If one of them has changed since the study began.
    """
    noted = read_json(path) if path.is_file() else {}
    for name, digest in inputs.items():
        if noted.setdefault(name, digest) != digest:
            raise UserError(
                f"The study in {path.parent} was begun with other {name}: new runs could not be compared with its own. "
                f"Give another -o, or restore them."
            )
    if keep:
        write_json(noted, path)


def digest_of(content: Any) -> str:
    """Compute the sha256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of_cases(source: Path, data: Path, cases: Sequence[str]) -> str:
    """Digest label maps and sizes of preprocessed files.

    Raises:
        UserError: If a file is missing.
    """
    ending, found = read_json(source / "dataset.json")["file_ending"], {}
    files: dict[str, list[tuple[str, int]]] = {}  # by name without its ending: the case, or the case and _seg
    for file in sorted(data.iterdir()):
        files.setdefault(file.name.rpartition(".")[0], []).append((file.name, file.stat().st_size))
    for case in sorted(cases):
        truth = source / "gt_segmentations" / f"{case}{ending}"
        own = [*files.get(case, []), *files.get(f"{case}_seg", [])]
        if any(name == f"{case}.npz" for name, _ in own):  # nnU-Net unpacks it when a training starts
            own = [(name, size) for name, size in own if not name.endswith(".npy")]
        if not truth.is_file() or not own:
            missing = f"label map {truth}" if own else f"preprocessed case {data / case}"
            raise UserError(f"There is no {missing}. Preprocess {source.name} again.")
        if problem := nifti_problem(truth):
            raise UserError(f"{truth} {problem}. Copy the label map again, delete this one and preprocess.")
        found[case] = [file_digest(truth), *own]
    return digest_of(found)


def data_folder(source: Path, plans: str, configuration: str) -> Path:
    """Return the folder of preprocessed cases of a configuration.

    Raises:
        UserError: If there are no such plans or configuration.
    """
    file = source / f"{plans}.json"
    if not file.is_file():
        raise UserError(f"{source.name} has no plans '{plans}'. Plan it first, or name others with -p.")
    return source / configuration_of(read_json(file), configuration)["data_identifier"]


def pool_size(dataset: str, plans: str, configuration: str, fold: int, group_by: str = "") -> int:
    """Count the labeled groups that are not held out."""
    source = dataset_folder(dataset)
    data = data_folder(source, plans, configuration)
    held_out, pool = held_out_and_pool(source, data, fold, group_by)
    pool, _ = without_duplicates(data, pool, held_out, group_by)
    if "ignore" in read_json(source / "dataset.json")["labels"]:
        pool = list(classes_of(data, pool))
    return len(grouped(pool, group_by))


def without_duplicates(
    data: Path, pool: Sequence[str], held_out: Sequence[str], group_by: str
) -> tuple[list[str], dict[str, str]]:
    """Leave out training cases whose image, or one of whose group, is held out.

    Returns:
        The pool without them, and training case -> held-out case.
    """
    found = find_duplicates(data, pool, data, held_out)
    for members in grouped(pool, group_by).values():
        twin = next((found[case] for case in members if case in found), None)
        if twin is not None:
            found |= {case: twin for case in members if case not in found}
    return [case for case in pool if case not in found], dict(sorted(found.items()))


def held_out_and_pool(source: Path, data: Path, fold: int, group_by: str = "") -> tuple[list[str], list[str]]:
    """Return a fold's validation and training cases.

    The data set's own split is taken, or the one that nnU-Net would make. Where that divides a group, the groups are
    split by nnU-Net's rule instead.

    Raises:
        UserError: If there is no such fold or data.
    """
    if not data.is_dir():
        raise UserError(f"No preprocessed data in {data}. Run nnUNetv2_plan_and_preprocess.")
    cases = sorted(stored_as(data).get_identifiers(str(data)))
    file = source / "splits_final.json"
    splits = read_json(file, list) if file.is_file() else _crossval_split(cases, FOLDS, source.name, "cases")
    if not 0 <= fold < len(splits):
        raise UserError(f"--fold: expected 0 to {len(splits) - 1} for {source.name}, got {fold}.")
    split = {part: [str(case) for case in splits[fold][part]] for part in ("val", "train")}
    chosen = {*split["val"], *split["train"]}  # a split may leave cases out
    groups = grouped([case for case in cases if case in chosen], group_by)
    if any(set(members) & set(split["val"]) and set(members) - set(split["val"]) for members in groups.values()):
        names = _crossval_split(sorted(groups), len(splits), source.name, "groups")[fold]
        split = {part: [case for group in names[part] for case in groups[group]] for part in split}
    shared = set(split["val"]) & set(split["train"])
    if shared or not split["val"]:
        raise UserError(
            f"Fold {fold} of {source.name} holds out {len(split['val'])} cases, {len(shared)} of them trained on. "
            f"Repair splits_final.json."
        )
    return split["val"], split["train"]


def _crossval_split(names: list[str], folds: int, dataset: str, what: str) -> list[dict[str, list[str]]]:
    """Split as nnU-Net does.

    Raises:
        UserError: If there are fewer names than folds.
    """
    if len(names) < folds:
        raise UserError(
            f"{dataset}: expected at least {folds} {what} for {folds} folds, got {len(names)}. Write a "
            f"splits_final.json with fewer folds."
        )
    if folds < 2:
        raise UserError(
            f"{dataset}: expected a splits_final.json that keeps {what} together, got one fold that divides one. "
            f"Correct it, or write two folds or more."
        )
    return generate_crossval_split(names, seed=12345, n_splits=folds)


def classes_of(data: Path, cases: Sequence[str]) -> dict[str, set]:
    """Read the classes that each labeled case shows.

    A case with nothing but the ignore label is not labeled.

    Raises:
        UserError: If a case cannot be read.
    """
    dataset = stored_as(data)(str(data), list(cases))
    found = {}
    for case in cases:
        try:
            _, _, _, properties = dataset.load_case(case)
        except Exception as error:  # damaged files raise anything
            raise UserError(f"Case '{case}' in {data} cannot be read ({error}). Preprocess it again.") from error
        places: Mapping = dict(properties["class_locations"])
        # of data sets with an ignore label nnU-Net notes the annotated voxels, under -1 and all labels
        annotated = [places[name] for name in places if isinstance(name, tuple) and -1 in name]
        if not annotated or len(annotated[0]):
            found[case] = {
                name for name, voxels in places.items() if len(voxels) and not (isinstance(name, tuple) and -1 in name)
            }
    return found
