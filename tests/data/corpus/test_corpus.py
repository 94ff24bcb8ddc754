import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.cli import main
from nnssl_ext.data import index
from nnssl_ext.data.cases import list_cases, open_case
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import MAX_JSON_BYTES, write_json
from tests.conftest import Environment
from tests.volumes import SHAPE, volume, write_image, write_series

NAME = "Dataset851_Open"
WithData = Callable[[str], Environment]


def make(*words: str | Path, like: str = "811") -> dict[str, Any]:
    """Run the command in this process; returns the manifest."""
    main(["corpus", "-d", "851", "-n", "Open", "--like", like, "-np", "1", *map(str, words)])
    return manifest()


def folder() -> Path:
    return Path(os.environ["nnUNet_preprocessed"]) / NAME


def data() -> Path:
    return folder() / "nnUNetPlans_3d_fullres"


def manifest() -> dict[str, Any]:
    return json.loads((folder() / "corpus.json").read_text())


def files_of(rows: dict[str, Any], status: str) -> dict[str, str]:
    return {Path(row["files"][0]).name: row["reason"] for row in rows["volumes"] if row["status"] == status}


def test_a_corpus_is_an_ordinary_preprocessed_data_set(target: Environment, images: Path) -> None:
    made = make(images)
    assert made["counts"] == {"kept": 4, "duplicate": 0, "unusable": 0, "no image": 0}
    assert sorted(path.name for path in folder().iterdir()) == [
        ".nnssl_ext_corpus.lock",
        "corpus.json",
        "dataset.json",
        "dataset_fingerprint.json",
        "nnUNetPlans.json",
        "nnUNetPlans_3d_fullres",
        "nnssl_ext_index_nnUNetPlans_3d_fullres.npz",
    ]
    plans = json.loads((folder() / "nnUNetPlans.json").read_text())
    assert plans == {**target.plans("plain"), "dataset_name": NAME}
    content = json.loads((folder() / "dataset.json").read_text())
    assert content["labels"]["background"] == 0
    assert (content["numTraining"], content["channel_names"]) == (4, {"0": "MR0"})
    row = next(row for row in made["volumes"] if row["files"][0].endswith("three.nrrd"))
    assert (row["shape"], row["spacing"], row["orientation"]) == ([*SHAPE], [2.0, 1.0, 1.0], "LPS")
    assert len(row["sha256"]) == len(row["content"]) == 64


def test_the_plans_of_an_early_nnunet(target: Environment, images: Path) -> None:
    new, old = (f"foreground_intensity_properties_{by}" for by in ("per_channel", "by_modality"))
    plans = target.plans("plain")
    plans[old] = plans.pop(new)
    write_json(plans, target.dataset("plain") / "nnUNetPlans.json")
    assert make(images)["preprocessing"][new] == plans[old]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_cases_are_what_nnunet_would_have_made(target: Environment, images: Path, reader: str) -> None:
    def read_by(plans: dict) -> None:
        plans["image_reader_writer"] = reader
        plans["transpose_forward"], plans["transpose_backward"] = [1, 0, 2], [1, 0, 2]

    target.write_plans("plain", "nnUNetPlans", {}, read_by)
    file = images / "a" / "one.nii.gz"
    image = SimpleITK.ReadImage(str(file))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    SimpleITK.WriteImage(image, str(file))
    make(images / "a")
    plans = PlansManager(target.plans("plain"))
    configuration, dataset_json = plans.get_configuration("3d_fullres"), folder() / "dataset.json"
    expected, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(file)], None, plans, configuration, str(dataset_json)
    )
    (case,) = [name for name in list_cases(data()) if name.startswith("one_")]
    np.testing.assert_allclose(open_case(data(), case)[:], expected, atol=1e-5)


def test_plans_of_another_name(target: Environment, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target.write_plans("plain", "nnUNetPlans_small", {})
    make(images, "-p", "nnUNetPlans_small")
    assert json.loads((folder() / "nnUNetPlans_small.json").read_text())["dataset_name"] == NAME
    said = capsys.readouterr().out
    assert "nnUNetv2_train 851 3d_fullres all -p nnUNetPlans_small -tr nnsslTrainer_VolumeFusion" in said


def test_the_index_is_there_before_the_first_training(
    target: Environment, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(images)
    read: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(index, "examine", lambda _, case: read.append(case))
        found = CaseIndex.build(data())
    assert not read
    for case in found.cases:
        expected = index.examine(data(), case)
        assert (found[case].shape, found[case].problem) == (expected.shape, "")
        np.testing.assert_array_equal(found[case].body, expected.body)


def test_equal_content_is_kept_once_whatever_its_format(target: Environment, images: Path) -> None:
    write_image(images / "c" / "again.mha", volume(0), (1.0, 1.0, 2.0))
    shutil.copy(images / "b" / "three.nrrd", images / "c" / "copy.nrrd")
    made = make(images)
    assert made["counts"]["kept"] == 4
    assert files_of(made, "duplicate").keys() == {"again.mha", "copy.nrrd"}
    assert len(list_cases(data())) == 4
    # the first one goes away in favour of another volume: its twin stands for the case
    write_image(images / "a" / "one.nii.gz", volume(20))
    made = make(images)
    assert made["counts"] == {"kept": 5, "duplicate": 1, "unusable": 0, "no image": 0}
    assert {row["case"] for row in made["volumes"] if row["case"]} == set(list_cases(data()))


def spoil(file: Path) -> None:
    """Change a file's content behind its size and date: whoever reads it again finds out."""
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_second_call_adds_new_files_and_reads_no_other(target: Environment, images: Path) -> None:
    make(images)
    stamps = list_cases(data())
    for file in images.rglob("*.*"):
        spoil(file)
    write_image(images / "new.nii.gz", volume(11))
    made = make(images)
    assert made["counts"] == {"kept": 5, "duplicate": 0, "unusable": 0, "no image": 0}
    after = list_cases(data())
    assert after.items() >= stamps.items()


def test_a_corpus_of_version_1_is_read_again(target: Environment, images: Path) -> None:
    made = make(images)
    old = {key: value for key, value in made.items() if key != "not_read"} | {"version": 1}
    for row in old["volumes"]:
        del row["kind"], row["remarks"]
    (folder() / "corpus.json").write_text(json.dumps(old))
    spoil(images / "a" / "one.nii.gz")
    again = make(images, "--max-failures", "50")
    assert (again["version"], again["counts"]["kept"]) == (2, 3)
    assert files_of(again, "unusable").keys() == {"one.nii.gz"}


def test_a_changed_file_replaces_its_case(target: Environment, images: Path) -> None:
    make(images)
    write_image(images / "a" / "one.nii.gz", volume(30))
    made = make(images)
    assert made["counts"]["kept"] == 4
    assert {row["case"] for row in made["volumes"]} == set(list_cases(data()))
    assert len(list(data().iterdir())) == 3 * 4


@pytest.mark.parametrize("name", ["a/one.nii.gz", "series"])
def test_a_file_that_is_not_there_today_keeps_its_case(
    target: Environment, images: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link whose target is not mounted."""
    write_series(images / "series", volume(7))
    stored = tmp_path / "archive"
    for file in [images / name] if name.endswith("gz") else list((images / name).iterdir()):
        stored.mkdir(exist_ok=True)
        shutil.move(file, stored / file.name)
        file.symlink_to(stored / file.name)
    made, cases = make(images), sorted(path.name for path in data().iterdir())
    stored.rename(tmp_path / "gone")
    assert make(images) == made
    assert sorted(path.name for path in data().iterdir()) == cases
    assert "Its case stays as it is" in capsys.readouterr().err
    (tmp_path / "gone").rename(stored)
    assert make(images) == made


def test_worker_processes_make_the_same(target: Environment, images: Path) -> None:
    alone = make(images)
    shutil.rmtree(folder())
    assert make(images, "-np", "2") == alone


def test_dicom_series(target: Environment, tmp_path: Path) -> None:
    source = tmp_path / "dicom"
    write_series(source / "patient1", volume(1), uid="1.2.3", more=lambda k: {"ImagePositionPatient": [0, 0, k]})
    write_series(source / "patient1", volume(2), uid="1.2.4", modality="CT")
    write_series(source / "patient2", volume(3), uid="1.2.5", skip=5)
    write_series(source / "patient3", volume(4), uid="1.2.6", modality="SEG")
    write_series(source / "patient4", volume(6), uid="1.2.7", turned=5)
    for number in range(4):
        (source / "patient1" / f"0{number}.txt").write_text("notes")
    made = make(source, "--max-failures", "50")
    kept = {row["series"]: row for row in made["volumes"] if row["status"] == "kept"}
    assert {uid: (row["modality"], row["spacing"], row["orientation"]) for uid, row in kept.items()} == {
        "1.2.3": ("MR", [1.0, 1.0, 1.0], "LPS"),
        "1.2.4": ("CT", [2.0, 1.0, 1.0], "LPS"),
    }
    stored = open_case(data(), kept["1.2.3"]["case"])[:][0]
    whole = volume(1).astype(np.int16)
    np.testing.assert_allclose(stored, (whole - whole.mean()) / whole.std(), atol=1e-4)
    assert "one may be missing" in files_of(made, "unusable")["patient2"]
    assert "turned against each other" in files_of(made, "unusable")["patient4"]
    assert made["counts"]["no image"] == 1
    assert made["not_read"] == {str(source): {".txt": 4}}
    assert make(source, "--max-failures", "50") == made


def test_a_conversion_beside_its_series_is_a_duplicate(target: Environment, tmp_path: Path) -> None:
    write_series(tmp_path / "scans", volume(1))
    flipped = np.diag([-1.0, 1.0, 2.0, 1.0])  # as dcm2niix writes it: rows from posterior to anterior
    flipped[1, 3] = -13
    rows = volume(1).astype(np.int16)[:, ::-1]
    nibabel.save(nibabel.Nifti1Image(rows.T, flipped), tmp_path / "scans" / "converted.nii.gz")
    assert make(tmp_path / "scans")["counts"] == {"kept": 1, "duplicate": 1, "unusable": 0, "no image": 0}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-d 811", "number 811 is taken by Dataset811_Plain"),
        ("--max-failures 200", "--max-failures: expected 0 to 100, got 200"),
        ("-n a__b", "-n letters, digits and hyphens, got 851 and 'a__b'"),
        ("-c 2d", "is 2-D; give 3d_fullres"),
        ("-c 4d", "have no configuration '4d'. They have 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres$"),
        ("--channels images=T9", "Name which to take"),
    ],
)
def test_impossible_words_write_nothing(target: Environment, images: Path, command: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(*command.split(), images)  # options may stand before the sources
    assert not folder().exists()


def test_a_corpus_has_one_target(target: Environment, images: Path, with_data: WithData) -> None:
    make(images)
    with_data("residual")
    with pytest.raises(UserError, match="was made with another target"):
        make(images, like="812")
    with pytest.raises(UserError, match="number 851 is taken by Dataset851_Open"):
        make(images, "-n", "Other")
    with pytest.raises(UserError, match="exists and is no corpus"):
        main(["corpus", "-d", "812", "-n", "Residual", "--like", "811", str(images)])


def test_a_deleted_case_with_a_duplicate_is_made_again(target: Environment, images: Path) -> None:
    shutil.copy(images / "b/four.mha", images / "b/copy.mha")
    made = make(images)
    (case,) = {row["case"] for row in made["volumes"] if row["status"] == "kept" and "b/" in row["files"][0]} - {
        row["case"] for row in made["volumes"] if "three" in row["files"][0]
    }
    (data() / f"{case}.b2nd").unlink()
    for _ in range(2):
        again = make(images)
        assert again["counts"] == made["counts"]
        assert set(list_cases(data())) == {row["case"] for row in again["volumes"] if row["status"] == "kept"}


def test_a_manifest_of_many_volumes_is_read(target: Environment, images: Path) -> None:
    """Settings of this size are refused."""
    made = make(images)
    with (folder() / "corpus.json").open("a") as file:
        file.write(" " * MAX_JSON_BYTES)
    assert make(images)["counts"] == made["counts"]


def test_what_a_call_left_that_ended_before_its_first_case_is_no_obstacle(target: Environment, images: Path) -> None:
    folder().mkdir()
    for name in (".nnssl_ext_corpus.lock", ".corpus.json.x.tmp"):
        (folder() / name).touch()
    assert make(images)["counts"]["kept"] == 4


def test_a_folder_that_cannot_be_made_is_named(target: Environment, images: Path) -> None:
    folder().symlink_to(folder().with_name("absent") / "absent")
    with pytest.raises(UserError, match="expected a folder that can be written for the corpus Dataset851_Open"):
        make(images)


def test_a_deleted_case_is_made_again_from_another_source(target: Environment, images: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "copies" / "copy.mha", volume(0), (1.0, 1.0, 2.0))
    (images / "a" / "two.nii").unlink()
    (case,) = {row["case"] for row in make(images / "a")["volumes"]}
    (data() / f"{case}.b2nd").unlink()
    made = make(tmp_path / "copies")
    assert made["counts"] == {"kept": 1, "duplicate": 0, "unusable": 1, "no image": 0}
    assert files_of(made, "unusable") == {"one.nii.gz": "its preprocessed case is gone. Name its source again"}
    assert {row["case"] for row in made["volumes"] if row["case"]} == set(list_cases(data()))
    assert len(list(data().iterdir())) == 3
    assert make(images / "a")["counts"] == {"kept": 1, "duplicate": 1, "unusable": 0, "no image": 0}


def test_no_processes_of_nnunet_are_one(target: Environment, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnUNet_def_n_proc=0."""
    monkeypatch.setattr("nnunetv2.configuration.default_num_processes", 0)
    main(["corpus", "-d", "851", "-n", "Open", "--like", "811", str(images)])
    assert manifest()["counts"]["kept"] == 4
