"""Pretrain on another data set, without held-out cases.

A corpus may hold a held-out case under another name. Cases are therefore compared by content: preprocessed alike, the
same image gives the same voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.data.cases import list_cases, open_case
from nnssl_ext.data.corpus.corpus import PREPROCESSING
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.inputs import data_folder

#: Blocks per axis whose mean intensities are a case's signature.
BLOCKS = 8
#: Correlation of signatures from which two cases are one. One voxel more on a side leaves 0.998. Different subjects of
#: the left atrium have at most 0.77.
ALIKE = 0.99
#: Relative difference of an edge up to which two shapes may belong to one image.
SAME_EDGE = 0.02


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


def signature(folder: Path, case: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape (D, H, W) and block means of a case.

    The means do not depend on scale and offset of the intensities.
    """
    volume = np.asarray(open_case(folder, case)[:1], dtype=np.float32)[0]
    means = volume
    for axis, edge in enumerate(volume.shape):
        blocks = min(BLOCKS, edge)
        bounds = np.linspace(0, edge, blocks + 1).astype(int)
        sums = np.add.reduceat(means, bounds[:-1], axis=axis)
        means = sums / np.diff(bounds).reshape([-1 if a == axis else 1 for a in range(3)])
    return volume.shape, means


def same_content(first: tuple[tuple[int, ...], np.ndarray], second: tuple[tuple[int, ...], np.ndarray]) -> bool:
    """Return whether two signatures belong to the same image, in any order and direction of axes."""
    (one, means), (other, others) = first, second
    flat, turned = means.ravel() - means.mean(), others - others.mean()
    norm = float(np.linalg.norm(flat) * np.linalg.norm(turned))
    for order in permutations(range(3)):
        edges = zip(one, (other[axis] for axis in order), strict=True)
        swapped = turned.transpose(order)
        if swapped.shape != means.shape or any(abs(a - b) > max(1, SAME_EDGE * max(a, b)) for a, b in edges):
            continue
        for steps in product((1, -1), repeat=3):
            mirrored = swapped[tuple(slice(None, None, step) for step in steps)]
            if norm > 0 and float(flat @ mirrored.ravel()) / norm >= ALIKE:
                return True
    return False


def find_twins(corpus: Path, target: Path, held_out: Sequence[str]) -> dict[str, str]:
    """Find corpus cases that equal held-out cases by content."""
    signatures = {case: signature(target, case) for case in held_out}
    found = {}
    for case in sorted(list_cases(corpus)):
        own = signature(corpus, case)
        twin = next((name for name, other in signatures.items() if same_content(own, other)), None)
        if twin is not None:
            found[case] = twin
    return found


def pretraining_data(
    dataset: str, target: Path, plans: str, configuration: str, held_out: Sequence[str]
) -> PretrainingData:
    """Check a corpus and choose its cases.

    Args:
        dataset: Name or number of the corpus.
        target: The target's folder in nnUNet_preprocessed.
        plans, configuration: The target's. The corpus must be preprocessed alike.
        held_out: The study's held-out cases.

    Raises:
        UserError: If the corpus is not preprocessed like the target, or nothing is left of it.
    """
    source = dataset_folder(dataset)
    data = data_folder(source, plans, configuration)
    own, theirs = (_preprocessing(read_json(folder / f"{plans}.json"), configuration) for folder in (target, source))
    differing = [name for name, value in own.items() if value != theirs[name]]
    if differing:
        raise UserError(
            f"--pretrain-on {dataset}: {source.name} and {target.name} differ in {', '.join(differing)}. Make the "
            f"corpus with nnssl_ext corpus --like {target.name} -p {plans}."
        )
    twins = find_twins(data, data_folder(target, plans, configuration), held_out)
    kept = [case for case in sorted(list_cases(data)) if case not in twins]
    if not kept:
        raise UserError(f"--pretrain-on {dataset}: every case of {source.name} is held out. Add other images to it.")
    return PretrainingData(source.name, source, data, kept, twins)


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
    link = folder / corpus.data.name
    if not link.is_symlink():
        link.symlink_to(corpus.data.resolve(), target_is_directory=True)
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if (corpus.source / name).is_file():
            write_json(read_json(corpus.source / name), folder / name)
    write_json({**plans, "dataset_name": corpus.name}, folder / f"{plans['plans_name']}.json")
    write_json([{"train": corpus.kept, "val": []}], folder / "splits_final.json")
    write_json(corpus.left_out, folder / "left_out.json")
