"""Calls that are stopped within a folder of DICOM series, and what is not the files' fault."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.corpus import dicom
from nnssl_ext.data.corpus.corpus import Corpus
from nnssl_ext.data.corpus.dicom import read_folder
from nnssl_ext.data.corpus.readers import read_image
from nnssl_ext.data.corpus.volumes import NotAnImage, NotWrittenError, Unusable
from nnssl_ext.errors import UserError
from tests.conftest import Environment
from tests.data.corpus.test_corpus import data, make, manifest
from tests.data.corpus.test_failures import _disk_is_full
from tests.support.runs import Killed
from tests.volumes import volume, write_image, write_series


def write_scans(folder: Path, *numbers: int) -> None:
    for number in numbers:
        write_series(folder, volume(number), uid=f"1.2.{number}")


@pytest.mark.parametrize("moved", [0, 1])
def test_a_folder_of_series_that_is_interrupted_is_read_again(
    target: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    write_scans(tmp_path / "scans", 1, 2, 3)
    original, calls = Corpus._take, list[int]()

    def take(self: Corpus, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2 and not moved:
            raise Killed
        original(self, *arguments)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_take", take)
        with pytest.raises(Killed):
            make(tmp_path / "scans")
    assert manifest()["counts"]["kept"] == 1 + moved
    assert make(tmp_path / "scans")["counts"] == {"kept": 3, "duplicate": 0, "unusable": 0, "no image": 0}
    assert len(list_cases(data())) == 3


def test_a_folder_of_series_that_grew_keeps_its_cases(
    target: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = tmp_path / "scans"
    write_scans(scans, 1, 2)
    make(scans)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data().iterdir()}
    write_scans(scans, 3)
    with monkeypatch.context() as patch:  # nothing is gone before its successor is there
        patch.setattr("nnssl_ext.data.corpus.corpus.prepare", _disk_is_full)
        with pytest.raises(UserError, match="Make room"):
            make(scans)
    assert {path.name for path in data().iterdir()} == set(before)
    assert make(scans)["counts"]["kept"] == 3
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data().iterdir()}
    assert before.items() <= after.items()
    # a series that is gone loses its case, and one that is normalized otherwise is made anew
    for path in scans.glob("1.2.1_*"):
        path.unlink()
    made = make(scans, "--normalization", f"{scans}=NoNormalization")
    assert made["counts"]["kept"] == 2
    assert len(list_cases(data())) == 2
    anew = {path.name: path.stat().st_mtime_ns for path in data().glob("*.b2nd")}
    assert all(after[name][1] != time for name, time in anew.items())


def test_a_full_disk_damages_no_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scans(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(dicom.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(NotWrittenError, match="bytes are needed, 100 are free"):
            list(read_folder(str(tmp_path), False))
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(dicom, "_link", Mock(side_effect=full))
        with pytest.raises(NotWrittenError, match="No space left"):
            list(read_folder(str(tmp_path), False))
    with monkeypatch.context() as patch:
        patch.setattr(dicom.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9))
        with pytest.raises(MemoryError):
            list(read_folder(str(tmp_path), False))


def test_a_lack_of_memory_in_itk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "one.mha", volume(0))
    failing = Mock(side_effect=RuntimeError("ITK ERROR: Failed to allocate memory for image."))
    monkeypatch.setattr("nnssl_ext.data.corpus.readers.SimpleITK.GetArrayFromImage", failing)
    with pytest.raises(MemoryError):
        read_image(str(tmp_path / "one.mha"))


@pytest.mark.parametrize(("single", "verdict"), [(True, NotAnImage), (False, Unusable)])
def test_a_4_d_image_is_told_by_its_header(tmp_path: Path, single: bool, verdict: type[Unusable]) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((200, 200, 200, 600))  # more voxels than are read
    path = tmp_path / "bold.nii"
    path.write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(Unusable, match="600") as error:
        read_image(str(path), single=single)
    assert error.type is verdict


def test_a_single_slice_needs_no_voxel_size_across(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((20, 30), np.uint8), np.eye(4))
    nibabel.save(image, tmp_path / "slice.nii")
    content = bytearray((tmp_path / "slice.nii").read_bytes())
    content[88:92] = bytes(4)  # pixdim[3]
    (tmp_path / "slice.nii").write_bytes(content)
    with pytest.raises(NotAnImage, match="single slice"):
        read_image(str(tmp_path / "slice.nii"))
