"""Image volumes as they lie about: NIfTI, NRRD, MetaImage files and DICOM series, read and looked at.

Everything in such a file is data from elsewhere: its header is checked before its voxels are read.
"""

from __future__ import annotations

import hashlib
import locale
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnssl_ext.files import file_digest

#: Endings of image files that hold a volume of their own.
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
#: No volume has more voxels: 8 GB of float32.
MOST_VOXELS = 2**31
#: Slices of a DICOM series may lie unevenly by this part of their distance.
UNEVEN = 0.05
#: An image has more different values than this; a map of labels seldom has.
FEW_VALUES = 16
#: Voxels of an image that are looked at first to tell.
SAMPLE = 100_000
#: DICOM modalities that are no images.
NO_IMAGES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG")


class Unusable(Exception):  # noqa: N818 (a verdict on a file, not an error of the program)
    """A volume that cannot be pretrained on, and why."""


class NotAnImage(Unusable):
    """Left out, but nothing is wrong with it."""


@dataclass
class Volume:
    """One channel of one image.

    Attributes:
        array: (D, H, W) float32.
        spacing: In mm, D H W.
        geometry: Spacing, origin and direction as SimpleITK gives them.
        orientation: Where the stored axes lead, as "LPS".
        modality: As DICOM names it; empty if unknown.
        series: DICOM's; empty for files.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    geometry: dict[str, tuple[float, ...]]
    orientation: str
    modality: str = ""
    series: str = ""

    def check(self) -> None:
        """Raises Unusable for what no method could learn from, NotAnImage for maps of labels."""
        if min(self.array.shape) < 2:
            raise Unusable(f"has one slice only: shape {self.array.shape}")
        if not all(np.isfinite(self.spacing)) or min(self.spacing) <= 0:
            raise Unusable(f"has spacing {self.spacing}")
        if not np.isfinite(self.array).all():
            raise Unusable("holds NaN or infinite values")
        if (self.array == self.array[:1, :1, :1]).all():
            raise Unusable("is constant: zero variance")
        voxels = self.array.ravel()
        if all(len(np.unique(some)) <= FEW_VALUES for some in (voxels[:: max(1, voxels.size // SAMPLE)], voxels)):
            raise NotAnImage(f"has only {len(np.unique(voxels))} different values, as a map of labels has")

    def digest(self) -> bytes:
        """Of voxels, shape and spacing: equal for equal content, whatever the file format."""
        head = f"{self.array.shape} {[round(edge, 4) for edge in self.spacing]}".encode()
        return hashlib.sha256(head + hashlib.sha256(np.ascontiguousarray(self.array).data).digest()).digest()


@contextmanager
def kept_locale() -> Iterator[None]:
    """Undo what the DICOM library does to the process: it makes ASCII the encoding of all text read afterwards."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


@kept_locale()
def read_file(path: str, canonical: bool = False) -> list[Volume]:
    """The channels of a file: one of a 3-D image, several of a 4-D one.

    Args:
        path: Of an image file.
        canonical: Turn the axes to right, anterior, superior, as nnU-Net's reorienting readers do.

    Raises:
        Unusable: If it cannot be read or its header makes no sense.
    """
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        _check_header(reader)
        if path.endswith((".nii", ".nii.gz")):
            _check_nifti(path)
        image = reader.Execute()
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # a strange file may raise anything
        raise Unusable(f"cannot be read: {reason(error)}") from error
    if image.GetDimension() == 3:
        return [_volume(image, canonical)]
    edges = [*image.GetSize()[:3], 0]
    return [_volume(SimpleITK.Extract(image, edges, [0, 0, 0, t]), canonical) for t in range(image.GetSize()[3])]


def read_series(folder: str, canonical: bool = False) -> Iterator[Volume | Unusable]:
    """The image series of one DICOM folder, or why one is unusable; series by series, in the order of their UIDs."""
    with kept_locale():
        identifiers = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(folder)
    if not identifiers:
        yield Unusable("holds no DICOM series that can be read")
    for series in sorted(identifiers):
        try:
            yield _series(folder, series, canonical)
        except Unusable as verdict:
            yield verdict
        except MemoryError:
            raise
        except Exception as error:
            yield Unusable(f"series {series} cannot be read: {reason(error)}")


def files_digest(files: list[str]) -> str:
    """The sha256 of a file, or of the digests of several in their order."""
    digests = [file_digest(Path(name)) for name in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def reason(error: BaseException) -> str:
    """ITK's many lines in one: the last that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-200:] if lines else type(error).__name__


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _check_header(reader: SimpleITK.ImageFileReader) -> None:
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) not in (3, 4):
        raise Unusable(f"is {len(size)}-D: size {size}")
    if components != 1:
        raise Unusable(f"has {components} values per voxel")
    if int(np.prod([int(n) for n in size], dtype=object)) > MOST_VOXELS or min(size) < 1:
        raise Unusable(f"has size {size}; at most {MOST_VOXELS} voxels are read")


def _check_nifti(path: str) -> None:
    """ITK fills what is missing of a truncated NIfTI file, and replaces NaN, without a word; nibabel does neither."""
    try:
        image: Any = nibabel.load(path)
        voxels = image.dataobj.get_unscaled()
    except MemoryError:
        raise
    except Exception as error:  # gzip, zlib and nibabel each have their own
        raise Unusable(f"cannot be read: {reason(error)}") from error
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise Unusable("holds NaN or infinite values")


@kept_locale()
def _series(folder: str, series: str, canonical: bool) -> Volume:
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(folder, series)
    first = SimpleITK.ImageFileReader()
    first.SetFileName(names[0])
    first.ReadImageInformation()
    modality = _tag(first, "0008|0060")
    if modality in NO_IMAGES:
        raise NotAnImage(f"series {series} is of modality {modality}, not an image")
    if len(names) == 1:
        (volume, *others) = read_file(names[0], canonical)
        if others:
            raise Unusable(f"series {series} is 4-D")
    else:
        _check_slices(names, series)
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(names)
        volume = _volume(reader.Execute(), canonical)
    volume.modality, volume.series = modality, series
    return volume


def _check_slices(names: tuple[str, ...], series: str) -> None:
    """A missing, repeated or turned slice would bend the volume unnoticed."""
    positions, sizes, turns = [], set(), set()
    reader = SimpleITK.ImageFileReader()
    for name in names:
        reader.SetFileName(name)
        reader.ReadImageInformation()
        sizes.add(reader.GetSize()[:2])
        turns.add(tuple(np.round(reader.GetDirection(), 3) + 0.0))
        normal = np.reshape(reader.GetDirection(), (3, 3))[:, 2]
        positions.append(float(normal @ np.asarray(reader.GetOrigin())))
    if len(sizes) > 1:
        raise Unusable(f"series {series} has slices of different sizes")
    if len(turns) > 1:
        raise Unusable(f"series {series} has slices that are turned against each other")
    gaps = np.abs(np.diff(positions))
    if gaps.min() <= 0 or gaps.max() - gaps.min() > UNEVEN * gaps.min():
        raise Unusable(f"series {series} has slices {gaps.min():g} to {gaps.max():g} mm apart; one may be missing")


def _tag(reader: SimpleITK.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _volume(image: SimpleITK.Image, canonical: bool) -> Volume:
    name = SimpleITK.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    if canonical:
        image = SimpleITK.DICOMOrient(image, "RAS")
    geometry: dict[str, Any] = {
        "spacing": image.GetSpacing(),
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
    }
    array = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    return Volume(array, tuple(abs(edge) for edge in reversed(image.GetSpacing())), geometry, name)
