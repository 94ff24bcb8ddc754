"""Take the samples of a run from its cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from nnssl_ext.data.crops import CropDataset, Sample
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.views.random import VALIDATION


@dataclass(frozen=True)
class SampleClasses:
    """Classes of labeled samples.

    Attributes:
        names: Class names in the order of their numbers.
        chance: Accuracy of always predicting the most frequent class.
    """

    names: tuple[str, ...]
    chance: float


#: A training and a validation data set.
Datasets = tuple[Dataset[Sample], Dataset[Sample]]
#: Training and validation cases of a fold; may write a split, so that all processes call it at the same place.
Split = Callable[[], tuple[list[str], list[str]]]


@dataclass(frozen=True)
class CaseSource:
    """Crops of the data set's own cases.

    Class attributes:
        kind: Plural noun for messages.
        classes: Classes of the samples, where they are labeled.
    """

    index: CaseIndex
    kind = "cases"
    classes = None

    def __len__(self) -> int:
        return len(self.index.cases)

    def summary(self, training_cases: int) -> str:
        """Describe what is learned from, in a few words."""
        return f"{training_cases} cases"

    def left_out(self) -> list[str]:
        """Return unreadable names with their reasons."""
        return [f"case '{case}' in {self.index.folder}: {problem}" for case, problem in self.index.left_out.items()]

    def fingerprint(self) -> dict[str, str]:
        """Return digests by name. Another state of the data has other digests."""
        return self.index.fingerprint()

    def datasets(self, request: Any, seed: int, split: Split, log: Callable[[str], None]) -> Datasets:
        """Make the training and the validation data set. ``log`` takes a line about an unusual choice."""
        training, validation = split()
        readable = sum(case not in self.index.left_out for case in validation)
        if readable < request.min_cases:
            log(f"{readable} validation cases are too few: using training cases instead.")
            validation = training
        elif set(validation) <= set(training):
            log("Fold 'all': the objective is validated on crops of the training cases.")
        return (
            CropDataset(self.index, training, request, seed),
            CropDataset(self.index, validation, request, seed, VALIDATION),
        )
