"""Read results of stock nnU-Net's runs as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnssl_ext.errors import UserError
from nnssl_ext.foreign import load_tensors
from nnssl_ext.recipe import read_json
from nnssl_ext.transfer.heads import output_names


def case_dice(validation: Path, dataset_json: dict) -> pd.DataFrame:
    """Read Dice per case and class: case, organ, dice.

    NaN where neither side has the class.

    Args:
        validation: A folder with nnU-Net's summary.json.
        dataset_json: The data set's, for the names of the classes.
    """
    path = validation / "summary.json"
    _, regions = output_names(dataset_json)
    names = {_key(value, regions): name for name, value in dataset_json["labels"].items()}
    rows = [
        {"case": Path(entry["prediction_file"]).name, "organ": names.get(label, label), "dice": metrics["Dice"]}
        for entry in read_json(path)["metric_per_case"]
        for label, metrics in entry["metrics"].items()
    ]
    return pd.DataFrame(rows)


def training_log(checkpoint_file: Path) -> dict[str, list[float]]:
    """Read the log in a checkpoint: values by key.

    Raises:
        UserError: If the file cannot be read without executing pickles.
    """
    try:
        logging = load_tensors(checkpoint_file)["logging"]
        return {key: [_mean(value) for value in values] for key, values in logging.items()}
    except Exception as error:  # damaged files raise anything
        raise UserError(f"cannot read the log of {checkpoint_file}: {type(error).__name__}: {error}") from error


def _mean(value: Any) -> float:
    return float(np.nanmean(np.asarray(value, dtype=float))) if np.size(value) else float("nan")


def _key(value: int | str | list[int], regions: bool) -> str:
    """Return the key of a label in nnU-Net's summary. Without regions a list of one is a label."""
    if isinstance(value, (list, tuple)):
        return str(tuple(value)) if regions else str(value[0])
    return str(value)
