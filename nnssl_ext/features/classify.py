"""Cross-validate simple classifiers on vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl_ext.data.cases import groups_of, shorten
from nnssl_ext.errors import UserError

#: Folds of a cross-validation, cross-validations with other folds, and bootstrap samples.
FOLDS, REPEATS, SAMPLES = 5, 5, 2000
NEIGHBORS = 5
CLASSIFIERS = ("logistic regression", "nearest neighbors")


@dataclass(frozen=True)
class Score:
    """Cross-validated balanced accuracy.

    Attributes:
        classifier: One of ``CLASSIFIERS``.
        accuracy: Mean over the classes of the share of cases that are recognized.
        low, high: 95 % interval, from a bootstrap over groups.
        chance: Balanced accuracy of guessing.
        cases, groups, folds: Numbers of them.
    """

    classifier: str
    accuracy: float
    low: float
    high: float
    chance: float
    cases: int
    groups: int
    folds: int


def read_labels(path: Path, group_by: str | None) -> pd.DataFrame:
    """Read the labels and groups of cases.

    Args:
        path: A csv file with the columns case, label and, if cases belong together, group.
        group_by: Another column for the groups, or a pattern as ``groups_of`` takes it.

    Returns:
        Columns label and group, by case. Without groups each case is its own.

    Raises:
        UserError: If the file cannot be read, lacks a column or names a case twice, or a name does not match.
    """
    try:
        # names such as NA and None are names, and a line may end with a comma
        table = pd.read_csv(
            path, dtype=str, skipinitialspace=True, keep_default_na=False, na_values=[""], index_col=False
        )
        table = table.dropna(subset=["case", "label"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Expected a csv file with columns case and label, got {path}: {error}") from error
    if table.empty:
        raise UserError(f"Expected rows with a case and a label in {path}, got none. Add them")
    twice = table["case"][table["case"].duplicated()]
    if len(twice):
        raise UserError(f"Expected each case once in {path}, got {shorten(twice)} again. Remove rows")
    column = group_by or "group"
    if column in table:
        table["group"] = table[column].fillna(table["case"])
    else:
        table["group"] = groups_of(table["case"].tolist(), group_by or "")
    return table.set_index("case")[["label", "group"]]


def cross_validate(vectors: np.ndarray, labels: Sequence[str], groups: Sequence[str], seed: int = 0) -> list[Score]:
    """Cross-validate the classifiers. All cases of a group are on one side of every split.

    Columns are standardized by the training cases. Logistic regression has scikit-learn's penalty (C = 1) and balanced
    classes. Predictions of several cross-validations are averaged.

    Args:
        vectors: (cases, columns).
        labels: Label of each case.
        groups: Group of each case.
        seed: Of folds and bootstrap.

    Raises:
        UserError: If there are fewer than two labels, or a label with fewer than two groups, or folds cannot be made.
    """
    kinds, truth = np.unique(np.asarray(labels), return_inverse=True)
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    counts = [len(np.unique(members[truth == kind])) for kind in range(len(kinds))]
    if len(kinds) < 2 or min(counts) < 2:
        found = ", ".join(f"{kind}: {count}" for kind, count in zip(kinds, counts, strict=True))
        raise UserError(f"Expected two labels or more with two groups of cases each, got {found}. Label more cases")
    folds, scores = min(FOLDS, *counts), []
    for name in CLASSIFIERS:
        right = np.zeros(len(truth))
        for repeat in range(REPEATS):
            splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed + repeat).split(
                vectors, truth, members
            )
            for train, test in splits:
                if len(learned := np.unique(truth[train])) < 2:
                    raise UserError(
                        f"Expected two labels or more in the training cases of each fold, got only "
                        f"{kinds[learned[0]]}: few groups hold the others. Label more cases"
                    )
                linear = LogisticRegression(class_weight="balanced", max_iter=10_000)
                nearest = KNeighborsClassifier(min(NEIGHBORS, len(train)))
                model = make_pipeline(StandardScaler(), linear if name == CLASSIFIERS[0] else nearest)
                model.fit(vectors[train], truth[train])
                right[test] += model.predict(vectors[test]) == truth[test]
        low, high = _interval(right / REPEATS, truth, members, seed)
        recalls = [right[truth == kind].mean() / REPEATS for kind in range(len(kinds))]
        sizes = (len(truth), len(names), folds)
        scores.append(Score(name, float(np.mean(recalls)), low, high, 1 / len(kinds), *sizes))
    return scores


def _interval(right: np.ndarray, truth: np.ndarray, members: np.ndarray, seed: int) -> tuple[float, float]:
    """Compute the 95 % interval of the balanced accuracy by a bootstrap over groups."""
    groups, kinds = members.max() + 1, truth.max() + 1
    hits, sizes = np.zeros((groups, kinds)), np.zeros((groups, kinds))
    np.add.at(hits, (members, truth), right)
    np.add.at(sizes, (members, truth), 1)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), SAMPLES)
    with np.errstate(invalid="ignore"):
        accuracies = np.nanmean(drawn @ hits / (drawn @ sizes), axis=1)  # a sample may lack a label
    low, high = np.percentile(accuracies, (2.5, 97.5))
    return float(low), float(high)
