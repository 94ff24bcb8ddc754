"""Corpora from files that are no use, and calls that are stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.corpus import corpus, preparation
from nnssl_ext.data.corpus.corpus import Limit
from nnssl_ext.data.corpus.manifest import KEPT, UNUSABLE, Entry
from nnssl_ext.data.corpus.preparation import Prepared, Target
from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.errors import UserError
from tests.conftest import Environment
from tests.data.corpus.test_corpus import data, files_of, folder, make, manifest
from tests.volumes import SHAPE, volume, write_bad_files, write_image


@pytest.fixture
def target(with_data: Callable[[str], Environment]) -> Environment:
    return with_data("plain")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("a/one.nii.gz", "a/two.nii", "b/three.nrrd", "b/four.mha")):
        write_image(tmp_path / "images" / name, volume(number))
    return tmp_path / "images"


def test_bad_files_are_named_and_left_out(
    target: Environment, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write_bad_files(images / "bad")
    made = make(images, "--max-failures", "90")
    assert made["counts"]["kept"] == 4
    found = files_of(made, "unusable")
    assert set(found) == set(expected)
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


def test_maps_of_labels_are_no_images(target: Environment, images: Path) -> None:
    labels = (volume(0) > 50).astype(np.uint8) + (volume(0) > 95)
    write_image(images / "a" / "one_seg.nii.gz", labels)
    made = make(images)  # and nothing is wrong with them
    assert made["counts"] == {"kept": 4, "duplicate": 0, "unusable": 0, "no image": 1}
    assert files_of(made, "no image") == {"one_seg.nii.gz": "has only 3 different values, as a map of labels has"}


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


def test_what_was_no_use_is_read_again_on_demand(
    target: Environment, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise preparation.Unusable("cannot be read")

    with monkeypatch.context() as patch:  # a disk that is out of reach for a moment
        patch.setattr(preparation, "read_file", fails)
        with pytest.raises(UserError, match="4 of 4 volumes"):
            make(images, "--max-failures", "80")
    with pytest.raises(UserError, match="4 of 4 volumes"):
        make(images)
    assert make(images, "--retry")["counts"]["kept"] == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(28, "No space left on device"), "No space left on device; make room"), (MemoryError(), "smaller -np")],
)
def test_a_full_disk_or_memory_is_no_files_fault(
    target: Environment, images: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    name = "run_case_save" if isinstance(error, OSError) else "run_case_npy"
    with monkeypatch.context() as patch:
        patch.setattr(f"nnunetv2.preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor.{name}", fails)
        with pytest.raises(UserError, match=message):
            make(images)
    assert manifest()["volumes"] == []
    assert make(images)["counts"]["kept"] == 4


def test_an_interrupted_call_goes_on(target: Environment, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = corpus.prepare
    done: list[Item] = []

    def stops(item: Item, target: Target) -> list[Prepared]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item)
        return prepare(item, target)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "prepare", stops)
        with pytest.raises(KeyboardInterrupt):
            make(images)
    assert manifest()["counts"]["kept"] == len(list_cases(data())) == 2
    assert not (folder() / "nnssl_ext_unfinished").exists()
    # what a killed call leaves: cases that the manifest does not know, and unfinished ones
    (folder() / "nnssl_ext_unfinished").mkdir()
    rows = manifest()
    (folder() / "corpus.json").write_text(json.dumps({**rows, "volumes": rows["volumes"][:1]}))
    assert make(images)["counts"]["kept"] == 4
    assert len(list_cases(data())) == 4


def test_what_a_killed_call_left_of_files_that_are_gone(target: Environment, images: Path) -> None:
    make(images)
    rows = manifest()
    (folder() / "corpus.json").write_text(json.dumps({**rows, "volumes": rows["volumes"][1:]}))
    shutil.rmtree(images / "a")
    made = make(images)
    assert {row["case"] for row in made["volumes"] if row["case"]} == set(list_cases(data()))
    assert len(list(data().iterdir())) == 3 * made["counts"]["kept"]
