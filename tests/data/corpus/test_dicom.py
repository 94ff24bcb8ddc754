"""DICOM folders: what becomes a volume, and the right values in it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from nnssl_ext.data.corpus.dicom import read_folder
from nnssl_ext.data.corpus.volumes import NotAnImage, Unusable, Volume
from tests.volumes import SHAPE, volume, write_dicom, write_enhanced, write_series

IMAGE = volume(1).astype(np.int16).astype(np.float32)
ULTRASOUND, SECONDARY, DICOMDIR = "1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.3.10"
STRUCTURES, REPORT, NUCLEAR = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("481.3", "88.11", "20"))


def only(folder: Path) -> Volume | Unusable:
    (found,) = read_folder(str(folder))
    return found


def kept(folder: Path) -> Volume:
    found = only(folder)
    assert isinstance(found, Volume), found
    return found


def same_as_image(found: Volume) -> None:
    assert (found.spacing, found.orientation) == ((2.0, 1.0, 1.0), "LPS")
    np.testing.assert_array_equal(found.array, IMAGE)


def test_slices_lie_by_their_positions(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, modality="CT", more=lambda k: {"InstanceNumber": 7})
    found = kept(tmp_path)
    same_as_image(found)
    assert (found.modality, found.series, found.remarks) == ("CT", "1.2.3", [])
    assert found.geometry["origin"] == (0.0, 0.0, 0.0)
    assert found.canonical().orientation == "RAS"
    np.testing.assert_array_equal(found.canonical().array, IMAGE[:, ::-1, ::-1])


def test_shuffled_frames_lie_by_their_positions(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(IMAGE))
    write_enhanced(tmp_path / "a.dcm", IMAGE[order], [2.0 * k for k in order])
    same_as_image(kept(tmp_path))


def test_slopes_may_differ_by_slice(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, more=lambda k: {"RescaleSlope": 1 + 0.5 * k, "RescaleIntercept": -10 * k})
    slices = np.arange(len(IMAGE))[:, None, None]
    np.testing.assert_allclose(kept(tmp_path).array, IMAGE * (1 + 0.5 * slices) - 10 * slices, atol=1e-3)


def test_echoes_are_volumes_of_their_own(tmp_path: Path) -> None:
    def echo(k: int) -> dict[str, Any]:
        number = k % 2 + 1
        return {"EchoNumbers": number, "EchoTime": 10 * number, "ImagePositionPatient": [0, 0, 2 * (k // 2)]}

    write_series(tmp_path, IMAGE, more=echo)
    first, second = read_folder(str(tmp_path))
    assert isinstance(first, Volume)
    assert isinstance(second, Volume)
    assert (first.remarks, second.remarks) == (["echo 1"], ["echo 2"])
    np.testing.assert_array_equal(first.array, IMAGE[::2])
    np.testing.assert_array_equal(second.array, IMAGE[1::2])


def test_a_tilted_gantry_is_straightened(tmp_path: Path) -> None:
    def tilted(k: int) -> dict[str, Any]:
        return {"ImagePositionPatient": [0, 2 * k * np.tan(np.radians(15)), 2 * k], "RescaleIntercept": 0}

    write_series(tmp_path, IMAGE, modality="CT", more=tilted)
    found = kept(tmp_path)
    assert found.remarks == ["gantry tilt of 15.0 degrees corrected by dcm2niix"]
    assert found.spacing == (2.0, 1.0, 1.0)
    centers = []
    for number, plane in enumerate(found.array):
        shifted = np.abs(np.pad(IMAGE[number], ((0, plane.shape[0] - SHAPE[1]), (0, 0))))
        scores = [float((np.roll(shifted, step, 0) * plane).sum()) for step in range(plane.shape[0])]
        centers.append(int(np.argmax(scores)))
    steps = np.unwrap(np.array(centers), period=found.array.shape[1])
    assert np.allclose(np.abs(np.diff(steps)).mean(), 2 * np.tan(np.radians(15)), atol=0.1)


@pytest.mark.parametrize(
    "syntax", [RLELossless, ExplicitVRBigEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
)
def test_transfer_syntaxes(tmp_path: Path, syntax: Any) -> None:
    for path in write_series(tmp_path, IMAGE):
        data = pydicom.dcmread(path)
        if syntax == RLELossless:
            data.compress(syntax)
        elif syntax == ExplicitVRBigEndian:
            data.PixelData = data.pixel_array.astype(">i2").tobytes()
        data.file_meta.TransferSyntaxUID = syntax
        order = {"little_endian": False, "implicit_vr": False} if syntax == ExplicitVRBigEndian else {}
        pydicom.dcmwrite(path, data, enforce_file_format=True, **order)
    same_as_image(kept(tmp_path))


def test_files_without_preamble(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, preamble=False)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(""))
    same_as_image(kept(tmp_path))


def test_a_study_time_for_each_slice(tmp_path: Path) -> None:
    """As scripts write that write slice by slice; dcm2niix would separate the slices."""
    write_series(tmp_path, IMAGE, more=lambda k: {"StudyDate": "20200101", "StudyTime": f"1200{k:02d}.5"})
    same_as_image(kept(tmp_path))


def test_a_slice_that_lies_there_twice(tmp_path: Path) -> None:
    paths = write_series(tmp_path, IMAGE)
    shutil.copy(paths[3], tmp_path / "copy.dcm")
    same_as_image(kept(tmp_path))


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "s\udcfc "
    write_series(folder, IMAGE)
    same_as_image(kept(folder))


def test_frames_of_nuclear_medicine(tmp_path: Path) -> None:
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    write_dicom(
        tmp_path / "a.dcm",
        IMAGE,
        sop=NUCLEAR,
        Modality="NM",
        SeriesInstanceUID="1.2",
        ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        DetectorInformationSequence=[detector],
        SpacingBetweenSlices=2,
        SliceThickness=2,
        PixelSpacing=[1, 1],
    )
    same_as_image(kept(tmp_path))


def short(folder: Path) -> None:
    paths = write_series(folder, IMAGE)
    paths[5].write_bytes(paths[5].read_bytes()[:-20])


def empty(folder: Path) -> None:
    write_series(folder, IMAGE)[-1].write_bytes(b"")


def page(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.dcm").write_text("<html>not found</html>")


def short_frames(folder: Path) -> None:
    write_enhanced(folder / "a.dcm", IMAGE, [2.0 * k for k in range(len(IMAGE))])
    (folder / "a.dcm").write_bytes((folder / "a.dcm").read_bytes()[:-20])


def too_many_frames(folder: Path) -> None:
    write_enhanced(folder / "a.dcm", IMAGE, [2.0 * k for k in range(len(IMAGE))])
    data = pydicom.dcmread(folder / "a.dcm")
    data.NumberOfFrames = 40
    data.save_as(folder / "a.dcm")


def uneven_frames(folder: Path) -> None:
    write_enhanced(folder / "a.dcm", IMAGE, [2.0 * k + 2 * (k > 5) for k in range(len(IMAGE))])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "short pixels": (short, "File not large enough to store image data"),
    "more rows than pixels": (lambda f: write_series(f, IMAGE, more=lambda k: {"Rows": 30}), "File not large enough"),
    "more frames than pixels": (
        lambda f: write_dicom(f / "a", IMAGE, sop="1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames=40, Modality="CT"),
        "without a position",
    ),
    "frames cut short": (short_frames, "File not large enough"),
    "more frames than descriptions": (too_many_frames, f"is damaged: 40 frames, {len(IMAGE)} descriptions of frames"),
    "an empty file": (empty, "is empty"),
    "a page of the web": (page, "is no DICOM file; it begins with b'<html>no'"),
    "a missing slice": (lambda f: write_series(f, IMAGE, skip=4), "2 to 4 mm apart; one may be missing"),
    "a missing frame": (uneven_frames, "2 to 4 mm apart; one may be missing"),
    "a turned slice": (lambda f: write_series(f, IMAGE, turned=4), "turned against each other"),
    "a shifted slice": (
        lambda f: write_series(f, IMAGE, more=lambda k: {"ImagePositionPatient": [3 * (k == 5), 0, 2 * k]}),
        "shifted in plane against each other",
    ),
    "a sheared MR": (
        lambda f: write_series(f, IMAGE, more=lambda k: {"ImagePositionPatient": [0, 0.5 * k, 2 * k]}),
        "is sheared: its slices are shifted in plane by 0.25",
    ),
    "no pixel spacing": (lambda f: write_series(f, IMAGE, more=lambda k: {"PixelSpacing": None}), "unknown voxel size"),
    "zero pixel spacing": (lambda f: write_series(f, IMAGE, more=lambda k: {"PixelSpacing": [0, 0]}), "unknown voxel"),
    "mixed pixel spacing": (
        lambda f: write_series(f, IMAGE, more=lambda k: {"PixelSpacing": [1 + (k > 5)] * 2}),
        "slices of different pixel spacing: 1 to 2 mm",
    ),
    "no positions": (lambda f: write_series(f, IMAGE, more=lambda k: {"ImagePositionPatient": None}), "a position"),
    "a header cut short": (
        lambda f: write_dicom(f / "a.dcm", None, Modality="CT", SeriesInstanceUID="1.2"),
        "is truncated: it has no image",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_series_are_named(tmp_path: Path, name: str) -> None:
    write, reason = DAMAGED[name]
    write(tmp_path / "series")
    found = list(read_folder(str(tmp_path / "series")))
    unusable = [one for one in found if isinstance(one, Unusable) and not isinstance(one, NotAnImage)]
    assert reason in " ".join(map(str, unusable))
    # an empty file at the end leaves the slices before it
    assert len([one for one in found if isinstance(one, Volume)]) == (name == "an empty file")


def planes(folder: Path) -> None:
    directions = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 1])
    write_series(folder, IMAGE, more=lambda k: {"ImageOrientationPatient": directions[k % 3]})


NO_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "scout": (lambda f: write_series(f, IMAGE[:1], more=lambda k: {"ImageType": ["A", "B", "LOCALIZER"]}), "localizer"),
    "three planes": (planes, "localizer"),
    "one slice": (lambda f: write_series(f, IMAGE[:1]), "single slice"),
    "film": (lambda f: write_dicom(f / "a.dcm", IMAGE, sop=ULTRASOUND, Modality="US"), "film"),
    "film of a slice": (lambda f: write_series(f, IMAGE, more=lambda k: {"ImagePositionPatient": [0, 0, 0]}), "film"),
    "capture": (lambda f: [write_dicom(f / f"{k}.dcm", IMAGE[k], sop=SECONDARY) for k in (0, 1)], "secondary capture"),
    "time": (lambda f: write_series(f, IMAGE, more=lambda k: {"ImagePositionPatient": [0, 0, k % 6]}), "4-D series"),
    "structures": (lambda f: write_dicom(f / "1.dcm", None, sop=STRUCTURES, Modality="RTSTRUCT"), "RTSTRUCT"),
    "report": (lambda f: write_dicom(f / "1.dcm", None, sop=REPORT, Modality="SR"), "SR"),
    "index of a CD": (lambda f: write_dicom(f / "DICOMDIR", None, sop=DICOMDIR), "DICOMDIR"),
    "colors": (lambda f: write_series(f, IMAGE, more=lambda k: {"SamplesPerPixel": 3}), "color image"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_intact_files_that_hold_no_volume(tmp_path: Path, name: str) -> None:
    write, kind = NO_IMAGES[name]
    write(tmp_path / "series")
    found = only(tmp_path / "series")
    assert isinstance(found, NotAnImage)
    assert found.kind == kind


def test_a_scout_in_the_series_of_its_scan(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, modality="CT")
    tags: dict[str, Any] = {
        "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        "Modality": "CT",
        "SeriesInstanceUID": "1.2.3",
    }
    write_dicom(tmp_path / "scout.dcm", np.zeros((40, 30)), **tags)
    scout, scan = read_folder(str(tmp_path))
    assert isinstance(scout, NotAnImage)
    assert isinstance(scan, Volume)
    same_as_image(scan)
