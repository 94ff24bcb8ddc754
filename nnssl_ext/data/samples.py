"""Define requests, sources and data sets of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nnssl_ext.data.crops import CropDataset, Sample
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.views.random import VALIDATION
from nnssl_ext.views.spatial import SourceBox


@dataclass(frozen=True)
class SampleClasses:
    """Classes of labeled samples.

    Attributes:
        names: Class names in the order of their numbers.
        chance: Accuracy of always predicting the most frequent class.
    """

    names: tuple[str, ...]
    chance: float


class SampleRequest(Protocol):
    """The crops that make one sample.

    Attributes:
        min_cases: Fewest cases that a run needs.
        fits_cases: Whether the size of the cases decides about the crops.
    """

    @property
    def min_cases(self) -> int: ...

    @property
    def fits_cases(self) -> bool: ...

    def placeholder(self, channels: int, sample: int) -> list[SourceBox]:
        """Return boxes of noise for tracing shapes."""


class SampleDataset(Protocol):
    """Samples by global index, for ``torch.utils.data.DataLoader``."""

    def __getitem__(self, sample: int) -> Sample: ...

    def sources(self, sample: int) -> list[str]:
        """Name what a sample is read from."""

    def sample_bytes(self) -> int:
        """Estimate the memory of a sample."""


#: A training and a validation data set.
Datasets = tuple[SampleDataset, SampleDataset]
#: Training and validation cases of a fold; may write a split, so that all processes call it at the same place.
Split = Callable[[], tuple[list[str], list[str]]]


class SampleSource(Protocol):
    """Source of the samples of a run.

    Attributes:
        kind: Plural noun for messages.
        classes: Classes of the samples, where they are labeled.
    """

    kind: str

    @property
    def classes(self) -> SampleClasses | None: ...

    def __len__(self) -> int: ...

    def summary(self, training_cases: int) -> str:
        """Describe what is learned from, in a few words."""

    def left_out(self) -> list[str]:
        """Return unreadable names with their reasons."""

    def fingerprint(self) -> dict[str, str]:
        """Return digests by name. Another state of the data has other digests."""

    def datasets(self, request: Any, seed: int, split: Split, log: Callable[[str], None]) -> Datasets:
        """Make the training and the validation data set.

        Args:
            request: The crops of a sample.
            seed: Seed of the run.
            split: Cases of the fold.
            log: Called with a line about an unusual choice.
        """


@dataclass(frozen=True)
class CaseSource:
    """Crops of the data set's own cases."""

    index: CaseIndex
    kind = "cases"
    classes = None

    def __len__(self) -> int:
        return len(self.index.cases)

    def summary(self, training_cases: int) -> str:
        return f"{training_cases} cases"

    def left_out(self) -> list[str]:
        return [f"case '{case}' in {self.index.folder}: {problem}" for case, problem in self.index.left_out.items()]

    def fingerprint(self) -> dict[str, str]:
        return self.index.fingerprint()

    def datasets(self, request: Any, seed: int, split: Split, log: Callable[[str], None]) -> Datasets:
        training, validation = split()
        if len(validation) < request.min_cases:
            log(f"{len(validation)} validation cases are too few: using training cases instead.")
            validation = training
        elif set(validation) <= set(training):
            log("Fold 'all': the objective is validated on crops of the training cases.")
        return (
            CropDataset(self.index, training, request, seed),
            CropDataset(self.index, validation, request, seed, VALIDATION),
        )
