"""Write the archive that the Decathlon's site takes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError
from nnssl_ext.files import replaced_on_success
from nnssl_ext.foreign import nifti_problem
from nnssl_ext.recipe import read_json

ENDING = ".nii.gz"
#: Spacings, origins and directions are stored in single precision.
CLOSE = 1e-3


def checked_files(task: str, folder: Path, raw: Path) -> dict[str, Path]:
    """Check the predictions of a task and return them by case.

    Args:
        task: TaskXX_NAME, the folder in the archive.
        folder: With ``CASE.nii.gz`` files.
        raw: The nnU-Net raw data set with imagesTs and dataset.json.

    Raises:
        UserError: About the cases that are missing, too many, or do not fit their image.
    """
    found = _cases(folder)
    channels = _cases(raw / "imagesTs").items()
    images = {name[:-5]: path for name, path in channels if name.endswith("_0000")}  # the first channel is enough
    for what, cases in (("are missing", set(images) - set(found)), ("have no image", set(found) - set(images))):
        if cases:
            raise UserError(f"{folder}: {len(cases)} predictions of {task} {what}: {shorten(sorted(cases))}")
    if not images:
        raise UserError(f"{raw / 'imagesTs'} holds no image. The challenge is about the test images")
    values = read_json(raw / "dataset.json").get("labels", {}).values()
    labels = {int(number) for value in values for number in np.atleast_1d(value)}
    problems = []
    for case in tqdm(sorted(images), f"Checking {task}", leave=False, disable=None):
        problem = problem_of(found[case], images[case], labels)
        if problem:
            problems.append(f"{case} {problem}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} predictions cannot be sent: {shorten(problems)}")
    return dict(sorted(found.items()))


def write_archive(checked: Mapping[str, Mapping[str, Path]], path: Path) -> int:
    """Write a zip with a folder per task. Return the cases.

    Args:
        checked: Task -> what ``checked_files`` returns.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        with replaced_on_success(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for task, files in checked.items():
                for case, file in files.items():
                    archive.write(file, f"{task}/{case}{ENDING}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return sum(map(len, checked.values()))


def problem_of(prediction: Path, image: Path, labels: set[int]) -> str:
    """Describe a problem of a prediction, '' without one.

    Args:
        prediction, image: Files. Of the image the header is read.
        labels: Values that may occur.
    """
    if problem := nifti_problem(prediction):
        return problem
    theirs = SimpleITK.ImageFileReader()
    theirs.SetFileName(str(image))
    try:
        ours = SimpleITK.ReadImage(str(prediction))
        theirs.ReadImageInformation()
    except RuntimeError as error:
        return f"cannot be read ({str(error).strip().splitlines()[-1]})"
    if ours.GetSize() != theirs.GetSize():
        return f"has size {ours.GetSize()}, its image has {theirs.GetSize()}"
    for name in ("Spacing", "Origin", "Direction"):
        value, expected = (getattr(file, f"Get{name}")() for file in (ours, theirs))
        if not np.allclose(value, expected, rtol=CLOSE, atol=CLOSE):
            return f"has {name.lower()} {value}, its image has {expected}"
    values = np.unique(SimpleITK.GetArrayViewFromImage(ours))
    foreign = [value for value in values.tolist() if value not in labels]
    if foreign:
        return f"has values {shorten(map(str, foreign))}, the labels are {sorted(labels)}"
    return ""


def _cases(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
    return {path.name.removesuffix(ENDING): path for path in files if not path.name.startswith((".", "_"))}
