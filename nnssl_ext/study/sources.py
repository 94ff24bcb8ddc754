"""Where a demonstration's data comes from: the phantom, or a task of the Medical Segmentation Decathlon."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnssl_ext.data.phantom import PhantomOptions, write_phantom
from nnssl_ext.errors import UserError
from nnssl_ext.foreign import unpack_tar
from nnssl_ext.recipe import write_json

#: Test cases taken from a Decathlon task: a fifth of its labelled cases, and no more than this.
MOST_TEST_CASES = 20


class Source(ABC):
    """A raw data set with its splits_final.json, which stock planning takes over.

    Fold 0 is for fine-tuning, fold 1 for pretraining; both spare the test cases.
    """

    title: str
    dataset: str

    @abstractmethod
    def write_raw(self, root: Path, scratch: Path) -> None:
        """Make the raw data set in an nnUNet_raw folder; ``scratch`` is a folder for intermediate files."""

    @property
    def number(self) -> str:
        """The data set's number, as nnU-Net's commands take it."""
        return str(int(self.dataset[7:10]))


@dataclass
class PhantomSource(Source):
    """The phantom, as data set 900."""

    options: PhantomOptions
    title = "the phantom"
    dataset = "Dataset900_Phantom"

    def write_raw(self, root: Path, scratch: Path) -> None:
        total = self.options.cases
        # made elsewhere and moved: an interrupted run leaves no half data set
        unfinished = scratch / self.dataset
        with tqdm(total=total, desc="Making cases", leave=False, disable=not sys.stderr.isatty()) as bar:
            write_phantom(unfinished, self.options, lambda done, _: bar.update(done - bar.n))
        unfinished.rename(root / self.dataset)


@dataclass
class DecathlonSource(Source):
    """A Decathlon task from its folder or tar file, of which only a few cases count as labelled.

    Args:
        path: ``TaskXX_NAME`` or ``TaskXX_NAME.tar``.
        labelled: Cases that fine-tuning sees.
        seed: Of the split.
    """

    path: Path
    labelled: int = 6
    seed: int = 0

    @cached_property
    def task(self) -> str:
        name = self.path.name.removesuffix(".tar")
        if not re.fullmatch(r"Task\d\d_\w+", name) or not self.path.exists():
            state = "does not exist" if not self.path.exists() else "is not named TaskXX_NAME or TaskXX_NAME.tar"
            raise UserError(f"--msd {self.path} {state}; give a Decathlon task's folder or tar file")
        return name

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"the Decathlon's {self.task}"

    @property
    def dataset(self) -> str:  # type: ignore[override]
        return f"Dataset{int(self.task[4:6]):03d}_{self.task[7:]}"

    def write_raw(self, root: Path, scratch: Path) -> None:
        source = self._unpacked(scratch) if self.path.is_file() else self.path
        for part in ("imagesTr", "labelsTr", "dataset.json"):
            if not (source / part).exists():
                raise UserError(f"{source} has no {part}; a Decathlon task has imagesTr, labelsTr and dataset.json")
        # nnU-Net's converter insists on imagesTs, which not every copy has: a folder of links has one
        linked = scratch / "linked" / self.task
        linked.mkdir(parents=True, exist_ok=True)
        for part in ("imagesTr", "labelsTr", "dataset.json"):
            if not (linked / part).exists():
                (linked / part).symlink_to((source / part).resolve())
        (linked / "imagesTs").mkdir(exist_ok=True)
        converter = Path(sys.executable).parent / "nnUNetv2_convert_MSD_dataset"
        finished = subprocess.run(
            [str(converter), "-i", str(linked), "-np", "2"],
            env={**os.environ, "nnUNet_raw": str(root)},
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            raise UserError(f"nnU-Net could not convert {self.path}: {finished.stderr.strip().splitlines()[-1]}")
        write_json(self._splits(root / self.dataset), root / self.dataset / "splits_final.json")

    def _splits(self, raw: Path) -> list[dict[str, list[str]]]:
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
        test = min(MOST_TEST_CASES, len(cases) // 5)
        if test < 1 or self.labelled < 1 or self.labelled + test >= len(cases):
            raise UserError(f"{self.path} has {len(cases)} labelled cases: too few for {self.labelled} and a test set")
        order = [cases[i] for i in np.random.default_rng(self.seed).permutation(len(cases))]
        held_out, rest = sorted(order[:test]), order[test:]
        return [
            {"train": sorted(rest[: self.labelled]), "val": held_out},
            {"train": sorted(rest), "val": held_out},
        ]

    def _unpacked(self, scratch: Path) -> Path:
        target = scratch / "unpacked"
        try:
            unpack_tar(self.path, target)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"cannot unpack {self.path}: {error}") from error
        return target / self.task
