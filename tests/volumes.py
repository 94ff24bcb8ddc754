"""Raw images of all formats, intact and damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SHAPE = (12, 14, 16)
#: Storage classes.
CT_CLASS, ENHANCED_CT_CLASS, MR_CLASS, SEG_CLASS = (
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "4", "66.4")
)


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A noisy ball: float32."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (100 * (sum(a**2 for a in axes) < 0.8) + 5 * noise).astype(np.float32)


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    """Write (D, H, W), or (T, D, H, W) as 4-D; ``spacing`` in mm, x y z."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 4:
        image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(part) for part in array])
    else:
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing(spacing[: image.GetDimension()])
    SimpleITK.WriteImage(image, str(path))
    return path


def write_dicom(
    path: Path, pixels: np.ndarray | None, *, sop: str = CT_CLASS, preamble: bool = True, **tags: Any
) -> Path:
    """Write one DICOM file: a slice (H, W), frames (D, H, W), or none. ``tags`` are elements by keyword."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.StudyInstanceUID = sop, generate_uid(), "1.2.9"
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[-2:]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = np.ascontiguousarray(pixels.astype(np.int16)).tobytes()
        data["PixelData"].VR = "OW"
        if pixels.ndim == 3:
            data.NumberOfFrames = len(pixels)
    for name, value in tags.items():
        setattr(data, name, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = sop  # type: ignore[assignment]
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(path, enforce_file_format=True)
    if not preamble:
        path.write_bytes(path.read_bytes()[132:])
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    *,
    uid: str = "1.2.3",
    modality: str = "MR",
    skip: int = -1,
    turned: int = -1,
    more: Callable[[int], dict[str, Any]] = lambda _: {},
    **options: Any,
) -> list[Path]:
    """Write a DICOM series, one file per slice of 1 x 1 x 2 mm.

    Args:
        folder: For the files.
        array: (D, H, W).
        uid: Of the series.
        modality: Of the series.
        skip: Slice that is left out.
        turned: Slice that is turned in its plane.
        more: Elements of a slice.
        options: Of ``write_dicom``.
    """
    paths = []
    for number, content in enumerate(array):
        if number == skip:
            continue
        tags: dict[str, Any] = {
            "Modality": modality,
            "SeriesInstanceUID": uid,
            "InstanceNumber": number + 1,
            "ImagePositionPatient": [0, 0, 2 * number],
            "ImageOrientationPatient": [0, 1, 0, -1, 0, 0] if number == turned else [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [1, 1],
            "SliceThickness": 2,
            **more(number),
        }
        sop = options.get("sop", {"CT": CT_CLASS, "MR": MR_CLASS}.get(modality, SEG_CLASS))
        paths.append(write_dicom(folder / f"{uid}_{number:03d}.dcm", content, **{**options, "sop": sop}, **tags))
    return paths


def write_enhanced(path: Path, array: np.ndarray, depths: Sequence[float], *, uid: str = "1.2.8") -> Path:
    """Write one enhanced CT file, (D, H, W); frame k lies at ``depths[k]`` mm."""
    frames = []
    for number, depth in enumerate(depths, 1):
        place, content, frame = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, depth]
        content.StackID, content.InStackPositionNumber = "1", number
        frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
        frames.append(frame)
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 2
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    return write_dicom(
        path,
        array,
        sop=ENHANCED_CT_CLASS,
        Modality="CT",
        SeriesInstanceUID=uid,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write one file of each kind that cannot be used; returns a part of the reason by name."""
    broken = volume(1)
    broken[3, 3, 3] = np.nan
    write_image(folder / "nan.nii.gz", broken)
    write_image(folder / "constant.mha", np.full(SHAPE, 7.0, np.float32))
    write_image(folder / "flat.nii.gz", volume(2)[:1])
    write_image(folder / "series.nii.gz", np.stack([volume(3), volume(4)]))
    write_image(folder / "tiny_spacing.nrrd", volume(5), (1e-7, 1.0, 1.0))
    whole = write_image(folder / "whole.nii", volume(6)).read_bytes()
    (folder / "whole.nii").unlink()
    (folder / "truncated.nii").write_bytes(whole[: len(whole) // 2])
    packed = write_image(folder / "packed.nii.gz", volume(7)).read_bytes()
    (folder / "packed.nii.gz").unlink()
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    for name in ("truncated.nrrd", "truncated.mha"):
        content = write_image(folder / name, volume(8)).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.nii.gz").write_text("no image at all")
    (folder / "empty.mha").write_bytes(b"")
    colors = SimpleITK.Compose([SimpleITK.GetImageFromArray(volume(seed)) for seed in range(3)])
    SimpleITK.WriteImage(colors, str(folder / "colors.nrrd"))
    huge = b"NRRD0004\ntype: float\ndimension: 3\nsizes: 60000 60000 60000\nspacings: 1 1 1\nencoding: raw\n"
    huge += b"endian: little\n\n1234"
    (folder / "huge.nrrd").write_bytes(huge)
    return {
        "nan.nii.gz": "NaN",
        "constant.mha": "zero variance",
        "flat.nii.gz": "single slice",
        "series.nii.gz": "4-D image: 2 volumes",
        "tiny_spacing.nrrd": "would have size",
        "truncated.nii": "cannot be read",
        "truncated.nii.gz": "cannot be read",
        "truncated.nrrd": "cannot be read",
        "truncated.mha": "cannot be read",
        "text.nii.gz": "cannot be read",
        "empty.mha": "it is empty",
        "colors.nrrd": "3 values per voxel",
        "huge.nrrd": "has size",
    }
