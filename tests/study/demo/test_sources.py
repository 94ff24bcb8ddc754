import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.errors import UserError
from nnssl_ext.study.demo.phantom import PhantomOptions
from nnssl_ext.study.demo.sources import DecathlonSource, PhantomSource

TASK = "Task77_Tiny"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A Decathlon task of ten cases, without imagesTs."""
    folder = tmp_path / "msd" / TASK
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    training = []
    for case in range(10):
        image = np.random.default_rng(case).random((8, 9, 10)).astype(np.float32)
        for part, volume in (("imagesTr", image), ("labelsTr", (image > 0.5).astype(np.uint8))):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(folder / part / f"tiny_{case}.nii.gz"))
        training.append({"image": f"./imagesTr/tiny_{case}.nii.gz", "label": f"./labelsTr/tiny_{case}.nii.gz"})
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "organ"},
        "numTraining": 10,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def written(source: DecathlonSource, tmp_path: Path) -> Path:
    for name in ("raw", "scratch"):
        (tmp_path / name).mkdir()
    source.write_raw(tmp_path / "raw", tmp_path / "scratch")
    return tmp_path / "raw" / source.dataset


@pytest.mark.parametrize("packed", [False, True])
def test_a_task_becomes_a_raw_data_set(task: Path, tmp_path: Path, packed: bool) -> None:
    path = task
    if packed:
        path = tmp_path / f"{TASK}.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(task, TASK)
    before = sorted(str(p) for p in task.rglob("*"))
    source = DecathlonSource(path, labeled=3)
    raw = written(source, tmp_path)
    assert source.dataset == "Dataset077_Tiny"
    assert len(list((raw / "imagesTr").glob("*_0000.nii.gz"))) == 10
    splits = json.loads((raw / "splits_final.json").read_text())
    assert [(len(s["train"]), len(s["val"])) for s in splits] == [(3, 2), (8, 2)]
    assert set(splits[0]["train"]) < set(splits[1]["train"])
    assert not set(splits[1]["train"]) & set(splits[1]["val"])
    assert sorted(str(p) for p in task.rglob("*")) == before


def test_names_and_contents_are_checked(task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist. Give a Decathlon task's folder or tar"):
        _ = DecathlonSource(tmp_path / "Task01_Absent").dataset
    with pytest.raises(UserError, match="is not named TaskXX_NAME"):
        _ = DecathlonSource(task.parent).dataset
    with pytest.raises(UserError, match="has 10 labeled cases: too few for 8 and a test set"):
        written(DecathlonSource(task, labeled=8), tmp_path)
    (task / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"has no dataset\.json. A Decathlon task has"):
        DecathlonSource(task).write_raw(tmp_path / "raw", tmp_path / "scratch")


def test_a_tar_that_would_leave_its_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{TASK}.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="cannot unpack"):
        written(DecathlonSource(path), tmp_path)
    assert not list(tmp_path.rglob("escaped"))
    path.write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="cannot unpack"):
        DecathlonSource(path).write_raw(tmp_path / "raw", tmp_path / "scratch")


def test_the_phantom_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PhantomSource(PhantomOptions(cases=4, labeled=1, test=1, field_of_view=16.0))
    for name in ("raw", "scratch"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(SimpleITK, "WriteImage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            source.write_raw(tmp_path / "raw", tmp_path / "scratch")
    assert not list((tmp_path / "raw").iterdir())
    (tmp_path / "again").mkdir()
    source.write_raw(tmp_path / "raw", tmp_path / "again")
    assert (tmp_path / "raw" / source.dataset / "splits_final.json").is_file()
