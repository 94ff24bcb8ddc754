"""Measure Dice and surface Dice of a fold's predictions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnssl_ext.errors import UserError
from nnssl_ext.foreign import nifti_problem
from nnssl_ext.study.decathlon.tasks import TASKS
from nnssl_ext.study.results import case_dice

#: For every other data set.
TOLERANCE = 2.0


def tolerance_of(dataset: str, dataset_json: Mapping[str, Any] | None) -> float:
    """Return a data set's surface tolerance in mm: the Decathlon's for its tasks.

    They are known by name and classes, or by name alone where ``dataset_json`` is None.
    """
    name = re.sub(r"^Dataset\d{3}_", "", dataset)
    task = next((task for task in TASKS if task.name == name), None)
    if task is None or dataset_json is None:
        return TOLERANCE if task is None else task.tolerance
    classes = {str(label).lower() for label in dataset_json["labels"]} - {"background", "ignore"}
    return task.tolerance if classes == {label.lower() for label in task.classes} else TOLERANCE


def fold_metrics(
    validation: Path, truth: Path, dataset_json: Mapping[str, Any], tolerance: float, reader: BaseReaderWriter
) -> pd.DataFrame:
    """Measure a folder: case, organ, dice, nsd.

    NaN where neither side has the class, and for a class that no case shows.

    Args:
        validation: With the predictions and nnU-Net's summary.json.
        truth: gt_segmentations.
        tolerance: In mm.
        reader: The data set's, as its plans name it.
    """
    frame = case_dice(validation, dict(dataset_json))
    classes = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
    frame["nsd"] = np.nan
    shown: set[str] = set()
    for case, rows in frame.groupby("case", sort=False):
        predicted, spacing = read_labels(validation / str(case), reader)
        expected, _ = read_labels(truth / str(case), reader)
        ignored = expected == dataset_json["labels"].get("ignore", -1)
        for row, organ in rows["organ"].items():
            labels = np.atleast_1d(classes[organ]).astype(int)
            ours, theirs = (np.isin(volume, labels) & ~ignored for volume in (predicted, expected))
            frame.loc[row, "nsd"] = normalised_surface_dice(ours, theirs, spacing, tolerance)
            shown |= {organ} if theirs.any() else set()
    # one wrong voxel would make their Dice 0, and the mean over classes half of what it was
    frame.loc[~frame["organ"].isin(shown), ["dice", "nsd"]] = np.nan
    return frame


def normalised_surface_dice(
    predicted: np.ndarray, expected: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> float:
    """Compute the share of both surfaces within ``tolerance``.

    Nikolov et al., arXiv 1809.04430, by MONAI.

    Args:
        predicted, expected: (D, H, W) bool.
        spacing: In mm, D H W.
        tolerance: In mm.

    Returns:
        In [0, 1]; NaN if both are empty, 0 if one is.
    """
    if not predicted.any() or not expected.any():
        return float("nan") if predicted.any() == expected.any() else 0.0
    from monai.metrics import compute_surface_dice  # takes seconds to import

    # an empty border: a surface at the edge of the image is one too
    a, b = (torch.from_numpy(np.pad(mask, 1))[None, None].float() for mask in (predicted, expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True)
    return float(value.item())


def run_scores(frame: pd.DataFrame, value: str, by: list[str]) -> pd.Series:
    """Average over cases, then classes, as nnU-Net does.

    Args:
        frame: Rows of one metric per case and organ.
        value: ``dice`` or ``nsd``.
        by: Columns that name a run.
    """
    return frame.groupby([*by, "organ"])[value].mean().groupby(level=by).mean()


def read_labels(path: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read a label map (D, H, W) and its spacing.

    Raises:
        UserError: If it is cut short or damaged.
    """
    if problem := nifti_problem(path):
        raise UserError(f"{path} {problem}. Delete it, and call the study again.")
    labels, properties = reader.read_seg(str(path))
    return labels[0], tuple(float(edge) for edge in properties["spacing"])
