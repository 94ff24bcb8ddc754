"""Corpora from damaged files, and calls that are stopped."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.corpus.corpus import Limit
from nnssl_ext.data.corpus.manifest import KEPT, NO_IMAGE, UNUSABLE, Entry
from nnssl_ext.data.corpus.preparation import CorpusTarget, prepare
from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.data.corpus.volumes import NotWrittenError
from nnssl_ext.errors import UserError
from tests.conftest import Environment
from tests.data.corpus.test_corpus import data, files_of, folder, make, manifest, spoil
from tests.volumes import SHAPE, volume, write_bad_files, write_image, write_series


def test_bad_files_are_named_and_left_out(
    target: Environment, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write_bad_files(images / "bad")
    made = make(images, "--max-failures", "90")
    assert made["counts"]["kept"] == 4
    found = files_of(made, "unusable") | files_of(made, "no image")
    assert set(found) == set(expected)
    # intact files that hold no 3-D image are no failures
    assert files_of(made, "no image").keys() == {"flat.nii.gz", "series.nii.gz", "colors.nrrd"}
    assert {name: text for name, text in found.items() if expected[name] not in text} == {}
    said = capsys.readouterr().err
    assert all(name in said for name in expected)


def test_too_many_bad_files_stop_it_and_a_later_call_goes_on(
    target: Environment, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(images / "a" / "zero.nii.gz", np.zeros(SHAPE, np.float32))
    with pytest.raises(UserError, match=r"1 of 5 volumes cannot be used, more than --max-failures 5"):
        make(images)
    assert "zero.nii.gz: is constant" in capsys.readouterr().err
    assert not (folder() / "dataset.json").exists()
    assert not (folder() / "nnssl_ext_unfinished").exists()
    with pytest.raises(UserError, match="1 of 5 volumes"):  # known by now: nothing is read again
        make(images)
    assert make(images, "--max-failures", "20")["counts"]["kept"] == 4
    (images / "a" / "zero.nii.gz").unlink()
    write_image(images / "a" / "zero.nii.gz", volume(9))
    assert make(images)["counts"] == {"kept": 5, "duplicate": 0, "unusable": 0, "no image": 0}


def test_label_maps_are_no_images(target: Environment, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = (volume(0) > 50).astype(np.uint8) + (volume(0) > 95)
    write_image(images / "a" / "one_seg.nii.gz", labels)
    made = make(images)  # and nothing is wrong with them
    assert made["counts"] == {"kept": 4, "duplicate": 0, "unusable": 0, "no image": 1}
    assert files_of(made, "no image") == {"one_seg.nii.gz": "label map: only 3 different values"}
    assert "passed by: 1 x label map, as " in capsys.readouterr().err


def test_a_folder_may_hold_many_volumes() -> None:
    def entries(good: int, bad: int) -> list[Entry]:
        return [Entry("s", ["f"], [], status) for status in [KEPT] * good + [UNUSABLE] * bad]

    limit = Limit(10, 3)
    limit.count(entries(9, 1))  # as in a DICOM folder of ten series
    limit.check()
    limit.count(entries(1, 0))
    limit.check()  # 17 expected by now
    limit.count(entries(0, 1))
    with pytest.raises(UserError, match="2 of 12 volumes"):
        limit.check()


def test_only_damaged_volumes_count_as_failures() -> None:
    limit = Limit(5, 40)
    for _ in range(20):
        limit.count([Entry("s", ["f"], [], NO_IMAGE)])
    limit.count([Entry("s", ["f"], [], UNUSABLE)])
    limit.check()  # one of the 20 that may still come
    for _ in range(19):
        limit.count([Entry("s", ["f"], [], NO_IMAGE)])
    with pytest.raises(UserError, match="1 of 1 volumes"):
        limit.check()


def test_unusable_files_are_read_again_on_demand(target: Environment, images: Path) -> None:
    file = images / "a" / "two.nii"
    good, stat = file.read_bytes(), file.stat()
    spoil(file)
    assert make(images, "--max-failures", "80")["counts"]["unusable"] == 1
    file.write_bytes(good)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert make(images, "--max-failures", "80")["counts"]["unusable"] == 1
    assert make(images, "--retry")["counts"]["kept"] == 4


@pytest.mark.parametrize(
    ("error", "expected", "line"),
    [
        (OSError(28, "No space left on device"), NotWrittenError, "No space left on device"),
        (MemoryError("too little"), MemoryError, "too little"),
    ],
)
def test_a_full_disk_or_memory_is_no_files_fault(
    target: Environment,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    expected: type[BaseException],
    line: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    like, scratch = target.dataset("plain"), tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "contents.json").write_text("{}")
    for name in ("nnUNetPlans.json", "dataset.json"):
        shutil.copy(like / name, scratch)
    with monkeypatch.context() as patch:
        patch.setattr(
            "nnunetv2.preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor.run_case_save", fails
        )
        patch.setattr("tempfile.tempdir", None)
        with pytest.raises(expected, match=line):
            prepare(Item("s", (str(images / "a" / "two.nii"),)), CorpusTarget(scratch, "nnUNetPlans", "3d_fullres"))


def test_a_full_disk_stops_it_and_a_later_call_goes_on(target: Environment, images: Path) -> None:
    """A folder in the place of the scratch folder's cases cannot be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnssl_ext.data.corpus.corpus.prepare", _disk_is_full)
        with pytest.raises(UserError, match="No space left on device. Make room"):
            make(images)
    assert manifest()["volumes"] == []
    assert make(images)["counts"]["kept"] == 4


def _disk_is_full(item: Item, target: CorpusTarget) -> None:
    raise NotWrittenError("cannot write: No space left on device")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_in_one_line_and_a_later_call_goes_on(
    target: Environment, images: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        write_image(images / f"more_{number}.nii.gz", volume(100 + number, (24, 24, 24)))

    def interrupt() -> None:
        while not (data().is_dir() and len(list_cases(data())) > 1):  # the manifest knows the first one
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        make(images)
    thread.join()
    said = capsys.readouterr().err.strip()
    kept = manifest()["counts"]["kept"]
    assert ended.value.code == 128 + getattr(signal, name)
    assert said == (
        f"Stopped by {name}: {kept} volumes are in Dataset851_Open, none is lost. Call the same command again to go on."
    )
    assert 0 < kept < 44
    assert len(list_cases(data())) in (kept, kept + 1)  # one may have been moved to its place just then
    assert not (folder() / "nnssl_ext_unfinished").exists()
    assert make(images)["counts"]["kept"] == 44
    assert len(list_cases(data())) == 44


def test_a_killed_call_goes_on(target: Environment, images: Path) -> None:
    """It leaves cases that the manifest does not know, and unfinished ones."""
    make(images)
    (folder() / "nnssl_ext_unfinished").mkdir()
    rows = manifest()
    (folder() / "corpus.json").write_text(json.dumps({**rows, "volumes": rows["volumes"][:1]}))
    assert make(images)["counts"]["kept"] == 4
    assert len(list_cases(data())) == 4


def test_files_that_end_their_reader_are_named(target: Environment, images: Path) -> None:
    """60 mm voxels would fill the memory, a pipe would block."""
    write_image(images / "huge.nii.gz", volume(40), (60.0, 60.0, 60.0))
    os.mkfifo(images / "pipe.nii.gz")
    made = make(images, "--max-failures", "50")
    assert made["counts"] == {"kept": 4, "duplicate": 0, "unusable": 1, "no image": 0}
    assert "at the target's spacing" in files_of(made, "unusable")["huge.nii.gz"]
    assert made["not_read"] == {str(images): {"pipes or devices": 1}}
    assert make(images, "--max-failures", "50") == made


def test_names_that_are_not_utf8(target: Environment, images: Path) -> None:
    write_image(images / "b" / "five.mhd", volume(5))
    for file in (images / "a" / "one.nii.gz", images / "b" / "four.mha"):
        os.rename(file, os.fsencode(file.parent) + b"/\xfc " + os.fsencode(file.name))
    os.rename(images / "b", os.fsencode(images) + b"/\xfc")
    made = make(images)
    assert made["counts"]["kept"] == 5
    assert make(images) == made


def test_the_normalization_is_suggested_where_it_is_needed(
    target: Environment, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ct(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
        properties = {"mean": 0.0, "std": 1.0, "percentile_00_5": 500.0, "percentile_99_5": 900.0}
        plans["foreground_intensity_properties_per_channel"] = {"0": properties}

    target.write_plans("plain", "nnUNetPlans", {}, ct)
    with pytest.raises(UserError, match="4 of 4 volumes cannot be used"):
        make(images, "--max-failures", "80")
    assert f"--normalization '{images}=ZScoreNormalization'?" in capsys.readouterr().err


def test_a_killed_call_whose_files_are_gone(target: Environment, images: Path) -> None:
    make(images)
    rows = manifest()
    (folder() / "corpus.json").write_text(json.dumps({**rows, "volumes": rows["volumes"][1:]}))
    shutil.rmtree(images / "a")
    made = make(images)
    assert {row["case"] for row in made["volumes"] if row["case"]} == set(list_cases(data()))
    assert len(list(data().iterdir())) == 3 * made["counts"]["kept"]


def test_one_slice_that_is_not_zero_is_no_volume(target: Environment, images: Path) -> None:
    """nnU-Net crops to it."""
    array = np.zeros(SHAPE, np.float32)
    array[5] = volume(0)[5]
    write_image(images / "slice.nii.gz", array)
    reason = files_of(make(images, "--max-failures", "20"), "unusable")["slice.nii.gz"]
    assert reason == "has size [1, 14, 16] once nnU-Net has cropped and resampled it"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="its first byte cannot be read")
def test_an_unreadable_file_beside_dicom_files_spoils_none(target: Environment, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_series(tmp_path / "scans" / name, volume(ord(name)), uid=f"1.2.{ord(name)}")
    (tmp_path / "scans" / "a" / "notes").symlink_to("/proc/self/mem")
    (tmp_path / "scans" / "b" / "more.dcm").symlink_to("/proc/self/mem")
    made = make(tmp_path / "scans", "--max-failures", "50")
    assert made["counts"] == {"kept": 1, "duplicate": 0, "unusable": 1, "no image": 0}
    assert files_of(made, "unusable") == {"b": "cannot be read: more.dcm: Input/output error"}
