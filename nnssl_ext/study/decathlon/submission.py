"""Write the archive that the Decathlon's site takes."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError
from nnssl_ext.files import replaced_on_success
from nnssl_ext.recipe import read_json

ENDING = ".nii.gz"
#: Spacings, origins and directions are stored in single precision.
CLOSE = 1e-3


@dataclass(frozen=True)
class Predictions:
    """Check the predictions of one task.

    Args:
        task: TaskXX_NAME, the folder in the archive.
        folder: With ``CASE.nii.gz`` files.
        raw: The nnU-Net raw data set or the Decathlon folder with imagesTs and dataset.json.
    """

    task: str
    folder: Path
    raw: Path

    def files(self) -> dict[str, Path]:
        """Return the checked predictions by case.

        Raises:
            UserError: About the cases that are missing, too many, or do not fit their image.
        """
        images, found = self._images(), _cases(self.folder)
        for what, cases in (("are missing", set(images) - set(found)), ("have no image", set(found) - set(images))):
            if cases:
                raise UserError(
                    f"{self.folder}: {len(cases)} predictions of {self.task} {what}: {shorten(sorted(cases))}"
                )
        if not images:
            raise UserError(f"{self.raw / 'imagesTs'} holds no image. The challenge is about the test images")
        labels = _labels(read_json(self.raw / "dataset.json"))
        problems = []
        for case in tqdm(sorted(images), f"Checking {self.task}", leave=False, disable=None):
            problem = problem_of(found[case], images[case], labels)
            if problem:
                problems.append(f"{case} {problem}")
        if problems:
            raise UserError(f"{self.folder}: {len(problems)} predictions cannot be sent: {shorten(problems)}")
        return dict(sorted(found.items()))

    def _images(self) -> dict[str, Path]:
        """Find the test images by case, first channel only."""
        found = _cases(self.raw / "imagesTs")
        if any(re.search(r"_\d{4}$", name) for name in found):  # as nnU-Net's converter names them
            return {name[:-5]: path for name, path in found.items() if name.endswith("_0000")}
        return found


def write_archive(tasks: list[Predictions], path: Path) -> int:
    """Write a zip with a folder per task. Return the cases.

    Raises:
        UserError: If any prediction is not as the site wants it; nothing is written then.
    """
    checked = [(task, task.files()) for task in tasks]
    try:
        with replaced_on_success(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for task, files in checked:
                for case, file in files.items():
                    archive.write(file, f"{task.task}/{case}{ENDING}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return sum(len(files) for _, files in checked)


def problem_of(prediction: Path, image: Path, labels: set[int]) -> str:
    """Describe a problem of a prediction, '' without one.

    Args:
        prediction, image: Files; a 4-D image counts with its first three axes.
        labels: Values that may occur.
    """
    try:
        ours, theirs = SimpleITK.ReadImage(str(prediction)), _header(image)
    except RuntimeError as error:
        return f"cannot be read ({str(error).strip().splitlines()[-1]})"
    if ours.GetDimension() != 3 or ours.GetSize() != theirs["size"]:
        return f"has size {ours.GetSize()}, its image has {theirs['size']}"
    for name, value in (
        ("spacing", ours.GetSpacing()),
        ("origin", ours.GetOrigin()),
        ("direction", ours.GetDirection()),
    ):
        if not np.allclose(value, theirs[name], rtol=CLOSE, atol=CLOSE):
            return f"has {name} {value}, its image has {theirs[name]}"
    values = np.unique(SimpleITK.GetArrayViewFromImage(ours))
    foreign = [value for value in values.tolist() if value not in labels]
    if foreign:
        return f"has values {shorten(map(str, foreign))}, the labels are {sorted(labels)}"
    return ""


def _header(path: Path) -> Mapping[str, tuple]:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    edge = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (edge, edge))[:3, :3]
    return {
        "size": tuple(reader.GetSize()[:3]),
        "spacing": tuple(reader.GetSpacing()[:3]),
        "origin": tuple(reader.GetOrigin()[:3]),
        "direction": tuple(direction.ravel().tolist()),
    }


def _labels(dataset_json: dict) -> set[int]:
    """Read nnU-Net's {name: value} or the Decathlon's {value: name}."""
    values: set[int] = set()
    for key, value in dataset_json.get("labels", {}).items():
        entry = key if isinstance(key, str) and key.isdigit() else value
        values.update(int(number) for number in np.atleast_1d(entry))
    return values


def _cases(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
    return {path.name.removesuffix(ENDING): path for path in files if not path.name.startswith((".", "_"))}
