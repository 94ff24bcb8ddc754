"""Fetch and convert the tasks of the Medical Segmentation Decathlon.

Antonelli et al., Nature Communications 13:4128.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nnssl_ext.environment import program
from nnssl_ext.errors import UserError
from nnssl_ext.files import link, lock_file
from nnssl_ext.foreign import unpack_tar
from nnssl_ext.study.decathlon.download import download

PARTS = ("imagesTr", "labelsTr", "dataset.json")


@dataclass(frozen=True)
class Task:
    """Describe one task.

    Attributes:
        number: 1 to 10.
        name: As in TaskXX_NAME.
        modalities: One per channel.
        classes: Foreground classes, from label 1 on.
        training, test: Published cases.
        tolerance: Of the surface Dice, in mm.
    """

    number: int
    name: str
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    training: int
    test: int
    tolerance: float

    @property
    def folder(self) -> str:
        return f"Task{self.number:02d}_{self.name}"

    @property
    def dataset(self) -> str:
        """As nnU-Net's converter calls it."""
        return f"Dataset{self.number:03d}_{self.name}"


TASKS = (
    Task(
        1,
        "BrainTumour",
        ("FLAIR", "T1w", "t1gd", "T2w"),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
        484,
        266,
        5.0,
    ),
    Task(2, "Heart", ("MRI",), ("left atrium",), 20, 10, 4.0),
    Task(3, "Liver", ("CT",), ("liver", "cancer"), 131, 70, 7.0),
    Task(4, "Hippocampus", ("MRI",), ("Anterior", "Posterior"), 260, 130, 1.0),
    Task(5, "Prostate", ("T2", "ADC"), ("PZ", "TZ"), 32, 16, 4.0),
    Task(6, "Lung", ("CT",), ("cancer",), 63, 32, 2.0),
    Task(7, "Pancreas", ("CT",), ("pancreas", "cancer"), 281, 139, 5.0),
    Task(8, "HepaticVessel", ("CT",), ("Vessel", "Tumour"), 303, 140, 3.0),
    Task(9, "Spleen", ("CT",), ("spleen",), 41, 20, 3.0),
    Task(10, "Colon", ("CT",), ("colon cancer primaries",), 126, 64, 4.0),
)


def tasks_table() -> str:
    """Format the tasks as a Markdown table."""
    rows = ["| task | images | classes | surface tolerance, mm | training, test cases |", "|---|---|---|---|---|"]
    for task in TASKS:
        cells = (task.folder, ", ".join(task.modalities), ", ".join(task.classes), f"{task.tolerance:g}")
        rows.append(f"| {' | '.join(cells)} | {task.training}, {task.test} |")
    return "\n".join(rows)


def find_task(word: str) -> Task:
    """Find a task by number or name.

    Raises:
        UserError: If there is none.
    """
    for task in TASKS:
        names = (str(task.number), f"{task.number:02d}", task.name, task.folder[:6], task.folder)
        if word.casefold() in (name.casefold() for name in names):
            return task
    raise UserError(f"the Decathlon has no task '{word}'. It has {', '.join(task.folder for task in TASKS)}")


def dataset_of(task: str) -> str:
    """Return nnU-Net's data set of ``TaskXX_NAME``."""
    return f"Dataset{int(task[4:6]):03d}_{task[7:]}"


def fetch_task(task: Task, root: Path, url: str | None = None, md5: str | None = None) -> Path:
    """Download, check and unpack a task. Return its folder.

    Args:
        root: Where ``TaskXX_NAME`` goes; its archive lies beside it until it is unpacked.
        url: Another mirror than the official one.
        md5: Of that mirror's file, where it is another one.
    """
    folder, archive = root / task.folder, root / f"{task.folder}.tar"
    if folder.exists():
        return folder
    from monai.apps.datasets import DecathlonDataset  # takes seconds to import

    with lock_file(root / f".{task.folder}.lock", f"{task.folder} in {root}"):
        for unfinished in root.glob(f".{task.folder}.*.tmp"):  # of a killed call
            shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.exists():
            checksum = (md5 or DecathlonDataset.md5[task.folder]).lower()
            download(url or DecathlonDataset.resource[task.folder], archive, checksum)
            unpack(archive, task.folder, root)
            archive.unlink()
    return folder


def unpack(archive: Path, task: str, root: Path) -> Path:
    """Unpack a task from a tar file, whole or not at all.

    Raises:
        UserError: If it is no such archive, or a member would leave the folder.
    """
    unfinished = Path(tempfile.mkdtemp(dir=root, prefix=f".{task}.", suffix=".tmp"))
    try:
        unpack_tar(archive, unfinished, lambda tar: _members(tar, task))
        if not (unfinished / task).is_dir():
            raise tarfile.ReadError(f"it holds no {task}")
        (unfinished / task).replace(root / task)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot unpack {archive}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root / task


def convert_task(source: Path, raw: Path, scratch: Path, *, test_images: bool = False, processes: int = 2) -> Path:
    """Convert a task by nnU-Net's own converter.

    Args:
        source: ``TaskXX_NAME``.
        raw: An nnUNet_raw folder.
        scratch: For intermediate files, on the same disk as ``raw``.
        test_images: Take imagesTs too.
        processes: Of the converter.

    Raises:
        UserError: If something is missing or the converter fails.
    """
    for part in PARTS:
        if not (source / part).exists():
            raise UserError(f"{source} has no {part}. A Decathlon task has imagesTr, labelsTr and dataset.json")
    dataset = dataset_of(source.name)
    # nnU-Net's converter insists on imagesTs, which not every copy has: a folder of links has one
    linked = scratch / "linked" / source.name
    linked.mkdir(parents=True, exist_ok=True)
    parts = (*PARTS, "imagesTs") if test_images and (source / "imagesTs").is_dir() else PARTS
    for part in parts:
        link(linked / part, source / part)
    (linked / "imagesTs").mkdir(exist_ok=True)
    # converted elsewhere and moved: an interrupted call leaves no half data set
    unfinished = scratch / "converted"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    # whether the number is free is asked of these three folders; the caller knows better
    roots = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    run_stock(
        ["nnUNetv2_convert_MSD_dataset", "-i", str(linked), "-np", str(processes)],
        f"could not convert {source}",
        dict.fromkeys(roots, str(unfinished)),
    )
    return (unfinished / dataset).replace(raw / dataset)


def run_stock(words: list[str], failure: str, variables: dict[str, str], show: bool = False) -> None:
    """Run one of nnU-Net's commands.

    Raises:
        UserError: With the last line it wrote, if it fails.
    """
    stderr = None if show else subprocess.PIPE
    stdout = None if show else subprocess.DEVNULL
    finished = subprocess.run(
        [program(words[0]), *words[1:]], env={**os.environ, **variables}, stdout=stdout, stderr=stderr, text=True
    )
    if finished.returncode:
        said = (finished.stderr or "").strip().splitlines()
        raise UserError(f"nnU-Net {failure}: {said[-1] if said else f'status {finished.returncode}'}")


def task_of_path(path: Path) -> str:
    """Return ``TaskXX_NAME`` of a folder or tar file.

    Raises:
        UserError: If it is absent or named otherwise.
    """
    name = path.name.removesuffix(".tar")
    if not re.fullmatch(r"Task\d\d_\w+", name) or not path.exists():
        state = "does not exist" if not path.exists() else "is not named TaskXX_NAME or TaskXX_NAME.tar"
        raise UserError(f"{path} {state}. Give a Decathlon task's folder or tar file")
    return name


def _members(tar: tarfile.TarFile, task: str) -> Iterator[tarfile.TarInfo]:
    """List a task's members without macOS's extra files.

    Raises:
        tarfile.TarError: For a member elsewhere.
    """
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if any(part.startswith("._") or part == ".DS_Store" for part in parts) or not parts:
            continue
        if parts[0] != task or ".." in parts:
            raise tarfile.ReadError(f"its member '{member.name}' would leave {task}")
        yield member
