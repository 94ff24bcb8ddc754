"""DICOM series: headers by pydicom, voxels by dcm2niix.

dcm2niix keeps what is no volume, or one of unknown or mixed spacing: headers are checked before it, sizes after it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dcm2niix
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from nnssl_ext import files
from nnssl_ext.data.corpus.readers import last_line, read_image, unreadable
from nnssl_ext.data.corpus.volumes import NotAnImage, NotWrittenError, Unusable, Volume

#: Suffixes of files that should be DICOM.
SUFFIXES = (".dcm", ".dicom", ".ima")
#: Modalities whose pixels, if any, are no image.
NO_IMAGES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "RWV", "DOC", "ECG")
#: SOP classes: the directory of a medium, the root of secondary captures, and CT, MR and PET with enhanced ones.
DICOMDIR, SECONDARY_CAPTURE = "1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.7"
_SLICES = tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "4", "4.1", "128", "130"))
#: Slices may lie unevenly by this part of their distance.
UNEVEN = 0.05
#: Positions that differ by less are one, in mm.
SAME_POSITION = 0.01
#: In-plane shift per slice distance that still is a right angle.
MAX_SHIFT = 0.01
#: Two files that agree in these hold the same slice, where they are there at all.
_IDENTITY = ("SOPInstanceUID", "ImagePositionPatient")
#: What is read of a header.
_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyDate",
    "StudyTime",
    "Modality",
    "SeriesInstanceUID",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "EchoTime",
    "DetectorInformationSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
#: Options of dcm2niix: no defaults file, this folder alone, rows as they are stored, neither cropped nor turned.
_OPTIONS = ("-g", "i", "-d", "0", "-b", "y", "-f", "volume", "-w", "2", "-z", "n", "-x", "i", "-y", "n")


@dataclass
class _Header:
    """One file."""

    path: Path
    data: Dataset

    @property
    def modality(self) -> str:
        return str(self.data.get("Modality", ""))

    @property
    def sop(self) -> str:
        meta = getattr(self.data, "file_meta", None) or Dataset()
        return str(self.data.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")

    @property
    def types(self) -> list[str]:
        return [str(word).upper() for word in _numbers(self.data.get("ImageType"))]

    @property
    def frames(self) -> int:
        return int(self.data.get("NumberOfFrames") or 1)


@dataclass
class _Plane:
    """Hold a slice's place, as its header gives it."""

    size: tuple[int, int]
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: np.ndarray | None


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by content or name."""
    if path.name.lower().endswith(SUFFIXES) or path.name == "DICOMDIR":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or _lacks_preamble(start)


def read_folder(folder: str, canonical: bool = False) -> Iterator[Volume | Unusable]:
    """Read the image series of one DICOM folder or file.

    Folders below it are left out. Volumes, or why there are none, come in the order of the series' UIDs. ``canonical``
    turns the axes to right, anterior, superior, as nnU-Net's reorienting readers do.
    """
    series, refused = dict[tuple[str, str], list[_Header]](), list[Unusable]()
    paths = [Path(folder)] if os.path.isfile(folder) else sorted(Path(folder).iterdir())
    dangling = sum(not path.exists() and path.name.lower().endswith(SUFFIXES) for path in paths)
    for path in paths:
        if path.name.startswith(".") or not path.is_file() or not is_dicom(path):
            continue
        try:
            header = _Header(path, _read_header(path))
            series.setdefault((str(header.data.get("SeriesInstanceUID", "")), header.modality), []).append(header)
        except MemoryError:
            raise
        except Unusable as verdict:
            refused.append(verdict)
        except Exception as error:  # values are parsed when they are used, and pydicom has many errors
            refused.append(Unusable(f"{path.name} cannot be read: {last_line(error)}"))
    yield from refused
    if dangling or not (series or refused):
        yield Unusable(f"{dangling} of its files are links to nothing" if dangling else "has no DICOM file")
    for uid, modality in sorted(series):
        for found in _read_series(series[uid, modality], canonical):
            found.series, found.modality = uid, modality
            yield found


def _read_header(path: Path) -> Dataset:
    with path.open("rb") as file:
        start = file.read(132)
    if not start:
        raise Unusable(f"{path.name} is empty")
    if start[128:] != b"DICM" and not _lacks_preamble(start):
        raise Unusable(f"{path.name} is no DICOM file; it begins with {start[:8]!r}")
    return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))


def _lacks_preamble(start: bytes) -> bool:
    """Return whether bytes begin DICOM without a preamble. Then an element of group 2 or 8 comes first."""
    if start[:2] not in (b"\x02\x00", b"\x08\x00") or len(start) < 16 or start[3:4] != b"\x00":
        return False
    return start[4:6] in (b"UL", b"UI", b"CS", b"OB") or start[5:8] == b"\x00\x00\x00"


def _read_series(headers: list[_Header], canonical: bool) -> Iterator[Volume | Unusable]:
    try:
        other: dict[str, list[_Header]] = {}
        for header in headers:
            other.setdefault(_kind(header), []).append(header)
        images = other.pop("", [])
        for kind, some in other.items():
            yield NotAnImage(kind, f"{some[0].path.name}{f' and {len(some) - 1} more' if len(some) > 1 else ''}")
        if images:
            yield from _read_images(images, canonical)
    except Unusable as verdict:
        yield verdict
    except (MemoryError, NotWrittenError):
        raise
    except Exception as error:  # a strange header may raise anything
        yield unreadable(error)


def _kind(header: _Header) -> str:
    """Name the kind of a file that is no slice. '' if it may be one."""
    data = header.data
    if header.sop == DICOMDIR:
        return "DICOMDIR"
    if header.modality in NO_IMAGES:
        return header.modality
    if not data.get("Rows") or not data.get("Columns"):
        if header.sop in _SLICES:
            raise Unusable(f"{header.path.name} is truncated: it has no image")
        return f"{header.modality or 'DICOM'} without an image"
    if "LOCALIZER" in header.types:
        return "localizer"
    if int(data.get("SamplesPerPixel") or 1) != 1:
        return "color image"
    return ""


def _read_images(headers: list[_Header], canonical: bool) -> Iterator[Volume | Unusable]:
    """Read the slices of a series. Duplicate slices are dropped."""
    unique = {tuple(str(header.data.get(tag) or header.path) for tag in _IDENTITY): header for header in headers}
    headers = list(unique.values())
    planes = [plane for header in headers for plane in _planes(header)]
    distance, levels, shift = _check_planes(headers, planes)
    spacing = planes[0].spacing
    assert spacing is not None
    with tempfile.TemporaryDirectory(prefix="dicom_") as folder:
        # dcm2niix separates slices by many elements; where each has a place of its own it need not
        merge = levels == len(planes) and len({str(header.data.get("EchoTime")) for header in headers}) == 1
        free = shutil.disk_usage(folder).free
        if free < (needed := sum(4 * plane.size[0] * plane.size[1] for plane in planes)):
            raise NotWrittenError(f"cannot write to {folder}: {needed} bytes are needed, {free} are free")
        outputs, said = _convert(headers, Path(folder), merge)
        if not outputs:
            raise Unusable(f"cannot be read: {said}")
        for file in outputs:
            try:
                yield _checked(file, canonical, (*spacing[::-1], distance), levels, shift)
            except Unusable as verdict:
                yield verdict


def _checked(file: Path, canonical: bool, spacing: Sequence[float], levels: int, shift: float) -> Volume:
    """Read dcm2niix's output and compare it with the headers."""
    sidecar = _sidecar(file.with_suffix(".json"))
    tilted = file.with_name(f"{file.stem}_Tilt_1.nii")
    if file.with_name(f"{file.stem}_Eq_1.nii").is_file():
        raise Unusable("has slices at uneven distances; one may be missing")
    if shift > MAX_SHIFT and not tilted.is_file():
        raise Unusable(f"is sheared: its slices are shifted in plane by {shift:.3g} of their distance")
    volume, *others = read_image(str(tilted if shift > MAX_SHIFT else file), canonical=False)
    if others:
        raise NotAnImage("4-D series", f"{1 + len(others)} volumes")
    if len(volume.array) != levels and levels > 1:
        raise (
            NotAnImage("single slice")
            if len(volume.array) == 1
            else Unusable(f"has {len(volume.array)} slices, its series lies at {levels} positions; one may be missing")
        )
    if not np.allclose(volume.spacing[::-1], spacing, rtol=UNEVEN):
        raise Unusable(f"has spacing {volume.spacing[::-1]}, its headers say {tuple(map(float, spacing))}")
    if shift > MAX_SHIFT:
        volume.remarks.append(f"gantry tilt of {np.degrees(np.arctan(shift)):.1f} degrees corrected by dcm2niix")
    if "DERIVED" in sidecar.get("ImageType", []):
        volume.remarks.append("derived")
    volume.remarks += [f"echo {sidecar['EchoNumber']}"] if "EchoNumber" in sidecar else []
    return volume.canonical() if canonical else volume


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes().decode(errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _planes(header: _Header) -> list[_Plane]:
    """Return the slice of a file, or all frames."""
    data = header.data
    size = int(data.Rows), int(data.Columns)
    shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = list(data.get("PerFrameFunctionalGroupsSequence") or [])
    if frames and len(frames) != header.frames:
        raise Unusable(f"is damaged: {header.frames} frames, {len(frames)} descriptions of frames")
    found = []
    for frame in frames or [Dataset()] * header.frames:
        groups = (frame, shared, *([data] if header.frames == 1 else []))
        position = _value(groups, "PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = _value(groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        found.append(_Plane(size, position, orientation, _value(groups, "PixelMeasuresSequence", "PixelSpacing", 2)))
    if not frames and header.frames > 1 and "RECON TOMO" in header.types:
        _place_tomography(data, found)
    return found


def _place_tomography(data: Dataset, planes: list[_Plane]) -> None:
    """Place the frames of nuclear medicine. Only the first one's position is stored, in the detector's sequence."""
    groups, distance = (data,), data.get("SpacingBetweenSlices")
    first = _value(groups, "DetectorInformationSequence", "ImagePositionPatient", 3)
    orientation = _value(groups, "DetectorInformationSequence", "ImageOrientationPatient", 6)
    if first is None or orientation is None or not distance:
        return
    normal = np.cross(orientation[:3], orientation[3:])
    spacing = _value(groups, "PixelMeasuresSequence", "PixelSpacing", 2)
    for number, plane in enumerate(planes):
        plane.position, plane.orientation = first + number * float(distance) * normal, orientation
        plane.spacing = spacing


def _value(groups: Sequence[Dataset], sequence: str, name: str, count: int) -> np.ndarray | None:
    for group in groups:
        inner = group.get(sequence)
        for place in ([inner[0]] if inner else []) + [group]:
            try:
                numbers = np.array(_numbers(place.get(name)), dtype=np.float64)
            except (TypeError, ValueError):
                continue
            if len(numbers) == count and np.isfinite(numbers).all():
                return numbers
    return None


def _numbers(value: Any) -> list[Any]:
    return [] if value is None or value == "" else [value] if isinstance(value, str) else list(value)


def _check_planes(headers: list[_Header], planes: list[_Plane]) -> tuple[float, int, float]:
    """Refuse what does not make one volume.

    Returns:
        Distance of neighboring slices in mm, number of positions, and in-plane shift per distance.
    """
    if len(planes) == 1:
        raise NotAnImage("single slice", headers[0].path.name)
    if any(plane.position is None or plane.orientation is None for plane in planes):
        if any(header.sop.startswith(SECONDARY_CAPTURE) for header in headers):
            raise NotAnImage("secondary capture")
        if any(header.frames > 1 and header.sop not in _SLICES for header in headers):
            raise NotAnImage("film", f"{len(planes)} frames without a position")
        raise Unusable("has slices without a position")
    if len({plane.size for plane in planes}) > 1:
        raise Unusable("has slices of different sizes")
    orientations = np.array([plane.orientation for plane in planes])
    same = (np.abs(orientations[:, None] - orientations[None, :: max(1, len(planes) // 50)]) < 1e-3).all(-1)
    if not same.all():
        if same.mean(0).max() < 2 / 3:  # planes of several directions
            raise NotAnImage("localizer", "its slices lie in different planes")
        raise Unusable("has slices that are turned against each other")
    spacings = [plane.spacing for plane in planes if plane.spacing is not None and plane.spacing.min() > 0]
    if len(spacings) < len(planes):
        raise Unusable("has unknown voxel size: no PixelSpacing")
    if not np.allclose(spacings, spacings[0], rtol=1e-3):
        raise Unusable(f"has slices of different pixel spacing: {np.min(spacings):g} to {np.max(spacings):g} mm")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    return _check_positions(np.array([plane.position for plane in planes]), normal)


def _check_positions(positions: np.ndarray, normal: np.ndarray) -> tuple[float, int, float]:
    """Check the positions of each echo and time."""
    depths = positions @ normal
    order = np.argsort(depths)
    gaps = np.diff(depths[order])
    real = gaps > SAME_POSITION
    if not real.any():
        raise NotAnImage("film", f"{len(positions)} images of one slice")
    gaps = gaps[real]
    if gaps.max() - gaps.min() > UNEVEN * gaps.min():
        raise Unusable(f"has slices {gaps.min():g} to {gaps.max():g} mm apart; one may be missing")
    across = np.diff((positions - depths[:, None] * normal)[order], axis=0)[real] / gaps[:, None]
    if np.ptp(across, axis=0).max() > UNEVEN:
        raise Unusable("has slices that are shifted in plane against each other")
    return float(np.median(gaps)), int(real.sum()) + 1, float(np.linalg.norm(across.mean(0)))


def _convert(headers: Sequence[_Header], folder: Path, merge: bool) -> tuple[list[Path], str]:
    """Convert one series.

    Args:
        headers: Of its files.
        folder: For links to them and for NIfTI files.
        merge: Make one volume of them, whatever differs but position and size.

    Returns:
        NIfTI files, and the last warning.
    """
    for name in ("in", "out"):
        (folder / name).mkdir()
    # scripts that write slice by slice write a time of their own into each, and dcm2niix separates studies
    studies = {(str(header.data.get("StudyDate")), str(header.data.get("StudyTime"))) for header in headers}
    for number, header in enumerate(headers):  # links: their names have plain letters
        _link(header, folder / "in" / f"{number:06d}.dcm", rewrite=merge and len(studies) > 1)
    command = [dcm2niix.bin, *_OPTIONS, "-m", "y" if merge else "2", "-o", str(folder / "out"), str(folder / "in")]
    ended = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if ended.returncode == -9:  # SIGKILL
        raise MemoryError("dcm2niix was killed")
    if ended.returncode < 0:
        raise Unusable(f"cannot be read: dcm2niix was ended by signal {-ended.returncode}")
    lines = (ended.stdout + ended.stderr).decode(errors="replace").splitlines()
    telling = [line for line in lines if re.match(r"(Warning|Error|FileSize|Unsupported|Unable)", line)]
    said = re.sub(rf"{re.escape(str(folder / 'in'))}/?", "", telling[-1] if telling else "dcm2niix made no volume")
    made = sorted((folder / "out").glob("*.nii"))
    return [file for file in made if not re.search(r"_(Eq|Tilt)_\d+$", file.stem)], said.strip()


def _link(header: _Header, link: Path, rewrite: bool) -> None:
    """Link a file, or rewrite what dcm2niix cannot read."""
    meta = header.data.file_meta
    deflated = meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
    if rewrite or deflated or (header.data.preamble is None and len(meta)):
        data = pydicom.dcmread(header.path, force=True)
        data.preamble, data.StudyDate, data.StudyTime = b"\0" * 128, "", ""
        if deflated or "TransferSyntaxUID" not in meta:
            data.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if data.original_encoding[0] else ExplicitVRLittleEndian
            )
        data.save_as(link)
        return
    files.link(link, header.path)
