"""List cases, and preprocess them with stock nnU-Net's preprocessor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from torch import Tensor

from nnssl_ext.data.cases import SUFFIXES, list_cases, open_case, shorten
from nnssl_ext.errors import UserError
from nnssl_ext.foreign import load_npz, nifti_problem
from nnssl_ext.transfer.target import TargetPlans

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Case:
    """A case and its files.

    Attributes:
        name: Its name.
        images: One image for each channel, or the file of a preprocessed case.
        mask: A label map on the images' grid; None if there is none.
        preprocessed: Whether the files are preprocessed already.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None = None
    preprocessed: bool = False

    @property
    def signature(self) -> str:
        """Describe the files by name, size and time."""
        files = [file for file in (*self.images, self.mask) if file is not None and file.is_file()]
        return " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


@dataclass(frozen=True)
class Preprocessed:
    """A preprocessed case.

    Attributes:
        image: (C, D, H, W), cropped, resampled and normalized.
        labels: (D, H, W) on the same grid; None without a label map.
        properties: nnU-Net's record of the original grid; empty for a case that was preprocessed before.
    """

    image: Tensor
    labels: Tensor | None
    properties: dict[str, Any]


def preprocess(case: Case, plans: TargetPlans) -> Preprocessed:
    """Crop, resample and normalize a case by the plans.

    A preprocessed case is read as it is. Labels are resampled label by label, as nnU-Net's are.

    Raises:
        UserError: If a file cannot be read or does not suit the plans.
    """
    properties: dict[str, Any] = {}
    files = [] if case.preprocessed else [*case.images, *filter(None, [case.mask])]
    for path in files:
        if problem := nifti_problem(path):
            raise UserError(f"case {case.name} cannot be preprocessed: {path} {problem}. Copy or convert it again")
    try:
        if case.preprocessed:
            folder = case.images[0].parent
            # torch wants memory that may be written; .npy files are opened for reading
            image = np.require(open_case(folder, case.name)[:], requirements="W")
            labels = _stored_labels(case.mask) if case.mask else None
        else:
            preprocessor = plans.configuration.preprocessor_class(verbose=False)
            images, mask = list(map(str, case.images)), str(case.mask) if case.mask else None
            image, labels, properties = preprocessor.run_case(
                images, mask, plans.plans, plans.configuration, plans.dataset_json
            )
    except Exception as error:  # damaged files and differing shapes raise anything
        reason = str(error)[:300] or "its images differ in shape or spacing"
        raise UserError(f"case {case.name} cannot be preprocessed: {reason}") from error
    if len(image) != plans.channels:
        raise UserError(f"case {case.name}: Expected {plans.channels} channels, got {len(image)}")
    if not np.isfinite(image).all():
        raise UserError(f"case {case.name}: Expected finite values, got NaN or infinite ones. Repair the image")
    # nnU-Net marks what it cropped or masked with negative values
    found = torch.from_numpy(labels[0]).int().clamp_min(0) if case.mask and labels is not None else None
    return Preprocessed(torch.from_numpy(image).float(), found, properties)


def image_cases(folder: Path, plans: TargetPlans) -> list[Case]:
    """List the cases in a folder of images.

    Names are nnU-Net's: CASE_0000.nii.gz, CASE_0001.nii.gz and so on, one file for each channel. Plans of one channel
    take files without ``_0000``, too.

    Raises:
        UserError: If the folder is missing or empty, or a case lacks a channel.
    """
    endings = plans.plans.image_reader_writer_class.supported_file_endings
    listed = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in listed if _stem(path, endings) and not path.name.startswith(".")]
    if not files:
        raise UserError(
            f"Expected images ({', '.join(endings)}) in {folder}, got none. Give the folder that holds them"
        )
    found: dict[str, dict[int, Path]] = {}
    for path in files:
        stem = _stem(path, endings)
        match = _CHANNEL.match(stem)
        if match is None and plans.channels > 1:
            raise UserError(f"Expected CASE_0000, CASE_0001, ..., got {path.name}. Name one file for each channel so")
        case, channel = (match["case"], int(match["channel"])) if match else (stem, 0)
        if channel in found.setdefault(case, {}):
            raise UserError(f"Expected one file of case {case}, got {found[case][channel].name} and {path.name}")
        found[case][channel] = path
    # where every case is one file, it may hold several channels, as RGB. ``preprocess`` counts them
    expected = 1 if all(list(channels) == [0] for channels in found.values()) else plans.channels
    for case, channels in found.items():
        if sorted(channels) != list(range(expected)):
            there = ", ".join(path.name for path in channels.values())
            raise UserError(
                f"Expected {plans.channels} channels of case {case}, got {there}, whose _{max(channels):04d} is read "
                f"as the channel's number. Add files, or rename them to CASE_0000 and so on"
            )
    return [Case(case, tuple(channels[c] for c in sorted(channels))) for case, channels in found.items()]


def dataset_cases(raw: Path | None, preprocessed: Path, plans: TargetPlans, original: bool) -> list[Case]:
    """List the training cases of a data set.

    They are the preprocessed ones where these suffice, else the raw images.

    Args:
        raw: The data set's folder in nnUNet_raw; None if there is none.
        preprocessed: Its folder in nnUNet_preprocessed.
        original: Whether the original images are needed.

    Raises:
        UserError: If there is neither.
    """
    folder = preprocessed / plans.configuration.data_identifier
    if folder.is_dir() and not original:
        cases = [_stored_case(folder, name) for name in list_cases(folder)]
        if cases:
            return cases
    if raw is None:
        wanted = "the images of this data set in nnUNet_raw" if original else f"preprocessed cases in {folder}"
        raise UserError(f"Expected {wanted}, got none. Set nnUNet_raw, or preprocess the data set")
    if "dataset" in plans.dataset_json:  # it names its files one by one
        listed = get_filenames_of_train_images_and_targets(str(raw), plans.dataset_json)
        return [Case(name, tuple(map(Path, files["images"])), Path(files["label"])) for name, files in listed.items()]
    ending = plans.dataset_json["file_ending"]
    cases = image_cases(raw / "imagesTr", plans)
    return [replace(case, mask=_existing(raw / "labelsTr" / f"{case.name}{ending}")) for case in cases]


def with_masks(cases: list[Case], masks: Path, plans: TargetPlans) -> list[Case]:
    """Give each case its label map.

    Args:
        masks: A folder with a file of each case's name, or one file for all cases.

    Raises:
        UserError: If a case has none.
    """
    if masks.is_file():
        return [replace(case, mask=masks) for case in cases]
    endings = plans.plans.image_reader_writer_class.supported_file_endings
    files = {_stem(path, endings): path for path in sorted(masks.iterdir())} if masks.is_dir() else {}
    missing = [case.name for case in cases if case.name not in files]
    if missing:
        raise UserError(f"Expected a mask for each case in {masks}, got none for {shorten(missing)}. Add them")
    return [replace(case, mask=files[case.name]) for case in cases]


def region_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Name the labels of a data set, without regions of several labels."""
    labels = dataset_json.get("labels", {})
    values = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in labels.items()
    }
    return {int(value): str(name) for name, value in values.items() if isinstance(value, (int, str))}


def _stem(path: Path, endings: list[str]) -> str:
    """Return a file's name without its ending, '' for another kind of file."""
    return next((path.name.removesuffix(ending) for ending in endings if path.name.endswith(ending)), "")


def _existing(*paths: Path) -> Path | None:
    """Return the first path that is a file."""
    return next((path for path in paths if path.is_file()), None)


def _stored_case(folder: Path, name: str) -> Case:
    """Find a preprocessed case's files. nnU-Net's .npz holds the labels, too."""
    names = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    mask = _existing(*(folder / f"{name}_seg{suffix}" for suffix in SUFFIXES), folder / f"{name}.npz")
    return Case(name, (_existing(*names) or names[0],), mask, True)


def _stored_labels(mask: Path) -> Any:
    labels = load_npz(mask, "seg") if mask.suffix == ".npz" else open_case(mask.parent, mask.stem)[:]
    return np.require(labels, requirements="W")
