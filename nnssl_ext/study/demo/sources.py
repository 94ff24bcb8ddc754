"""Provide a demo's data: phantom or Decathlon task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json
from nnssl_ext.study.decathlon.tasks import convert_task, dataset_of, task_of_path, unpack
from nnssl_ext.study.demo.phantom import PhantomOptions, write_phantom

#: Test cases taken from a Decathlon task: a fifth of its labeled cases, and no more than this.
MOST_TEST_CASES = 6


@dataclass
class PhantomSource:
    """The phantom, as data set 900."""

    options: PhantomOptions
    title = "the phantom"
    dataset = "Dataset900_Phantom"

    @property
    def labeled(self) -> int:
        return self.options.labeled

    def write_raw(self, root: Path, scratch: Path) -> None:
        write_phantom(root / self.dataset, self.options)


@dataclass
class DecathlonSource:
    """Take a Decathlon task with few labeled cases.

    Args:
        path: ``TaskXX_NAME`` or ``TaskXX_NAME.tar``.
        labeled: Cases that fine-tuning sees.
    """

    path: Path
    labeled: int = 6

    @cached_property
    def task(self) -> str:
        return task_of_path(self.path)

    @property
    def title(self) -> str:
        return f"the Decathlon's {self.task}"

    @property
    def dataset(self) -> str:
        return dataset_of(self.task)

    def write_raw(self, root: Path, scratch: Path) -> None:
        """Write the data set into nnUNet_raw. ``scratch`` holds intermediate files."""
        source = unpack(self.path, self.task, scratch) if self.path.is_file() else self.path
        whole = scratch / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        made = convert_task(source, whole, scratch)
        write_json(self._splits(made), made / "splits_final.json")
        made.replace(root / self.dataset)

    def _splits(self, raw: Path) -> list[dict[str, list[str]]]:
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
        test = min(MOST_TEST_CASES, len(cases) // 5)
        if test < 1 or self.labeled < 1 or self.labeled + test >= len(cases):
            raise UserError(f"{self.path} has {len(cases)} labeled cases: too few for {self.labeled} and a test set")
        order = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
        held_out, rest = sorted(order[:test]), order[test:]
        return [
            {"train": sorted(rest[: self.labeled]), "val": held_out},
            {"train": sorted(rest), "val": held_out},
        ]


#: What writes a raw data set with its splits_final.json. Fold 0 is for fine-tuning, fold 1 for pretraining; both spare
#: the test cases.
Source = PhantomSource | DecathlonSource
