"""Pretrain on another data set, without held-out cases.

A corpus may hold a held-out case under another name. Cases are therefore compared by content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.corpus.corpus import PREPROCESSING
from nnssl_ext.data.index import copy_index
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.files import link
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.duplicates import find_duplicates
from nnssl_ext.study.inputs import data_folder


@dataclass(frozen=True)
class PretrainingData:
    """Name a corpus and the cases to pretrain on.

    Attributes:
        name: DatasetXXX_NAME.
        source: Its folder in nnUNet_preprocessed.
        data: Its preprocessed cases.
        kept: Cases to pretrain on.
        left_out: Corpus case -> held-out case with the same content.
    """

    name: str
    source: Path
    data: Path
    kept: list[str]
    left_out: dict[str, str]


def pretraining_data(
    dataset: str, target: Path, plans: str, configuration: str, held_out: Sequence[str]
) -> PretrainingData:
    """Check a corpus and choose its cases.

    Args:
        dataset: Name or number of the corpus.
        target: The target's folder in nnUNet_preprocessed.
        plans, configuration: The target's. The corpus must be preprocessed alike.

    Raises:
        UserError: If the corpus is not preprocessed like the target, or nothing is left of it.
    """
    source = dataset_folder(dataset)
    if source.name == target.name:
        raise UserError(
            f"--pretrain-on {dataset}: expected another data set than {target.name}. Leave it out: pretraining takes "
            f"the study's own images by default."
        )
    data = data_folder(source, plans, configuration)
    own, theirs = (_preprocessing(read_json(folder / f"{plans}.json"), configuration) for folder in (target, source))
    differing = [name for name, value in own.items() if value != theirs.get(name)]
    if differing:
        raise UserError(
            f"--pretrain-on {dataset}: {source.name} and {target.name} differ in {', '.join(differing)}. Make the "
            f"corpus with nnssl_ext corpus --like {target.name} -p {plans}."
        )
    cases = sorted(list_cases(data))
    left_out = find_duplicates(data, cases, data_folder(target, plans, configuration), held_out)
    kept = [case for case in cases if case not in left_out]
    if not kept:
        raise UserError(f"--pretrain-on {dataset}: every case of {source.name} is held out. Add other images to it.")
    return PretrainingData(source.name, source, data, kept, left_out)


def _preprocessing(plans: dict, configuration: str) -> dict[str, Any]:
    """Return what decides how a case looks after preprocessing."""
    chosen = PlansManager(plans).get_configuration(configuration).configuration
    result = {name: chosen.get(name) for name in PREPROCESSING}
    result["transpose_forward"] = plans["transpose_forward"]
    if "CTNormalization" in chosen["normalization_schemes"]:  # the others read no fixed numbers
        result["intensities"] = plans["foreground_intensity_properties_per_channel"]
    return result


def write_pretraining_data(corpus: PretrainingData, folder: Path, plans: dict) -> None:
    """Write links, plans and split of a corpus.

    Args:
        corpus: As ``pretraining_data`` returns it.
        folder: Of the corpus in the study.
        plans: The study's plans.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / corpus.data.name, corpus.data)
    copy_index(corpus.data, folder)
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if (corpus.source / name).is_file():
            write_json(read_json(corpus.source / name), folder / name)
    write_json({**plans, "dataset_name": corpus.name}, folder / f"{plans['plans_name']}.json")
    write_json([{"train": corpus.kept, "val": []}], folder / "splits_final.json")
    write_json(corpus.left_out, folder / "left_out.json")
