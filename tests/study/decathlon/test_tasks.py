import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.cli import main
from nnssl_ext.cli.msd import _remove_torn
from nnssl_ext.errors import UserError
from nnssl_ext.study.decathlon.tasks import TASKS, find_task, unpack
from nnssl_ext.study.metrics import tolerance_of
from tests.conftest import Environment
from tests.documents import shown_lines
from tests.study.decathlon.test_download import Server, server
from tests.volumes import volume, write_image

__all__ = ["server"]
TASK = "Task04_Hippocampus"
DATASET = "Dataset004_Hippocampus"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A Decathlon task of three training and two test cases."""
    folder = tmp_path / "task" / TASK
    for case in range(3):
        image = volume(case)
        write_image(folder / "imagesTr" / f"hippocampus_{case:03d}.nii.gz", image, (1.0, 1.0, 2.0))
        write_image(
            folder / "labelsTr" / f"hippocampus_{case:03d}.nii.gz", (image > 50).astype(np.uint8), (1.0, 1.0, 2.0)
        )
    for case in (7, 8):
        write_image(folder / "imagesTs" / f"hippocampus_{case:03d}.nii.gz", volume(case), (1.0, 1.0, 2.0))
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 3,
        "numTest": 2,
        "training": [],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def pack(folder: Path, path: Path, extra: Callable[[tarfile.TarFile], None] = lambda _: None) -> bytes:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, f"./{folder.name}")
        extra(archive)
    return path.read_bytes()


def add(archive: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    archive.addfile(member, io.BytesIO(b""))


def test_the_ten_tasks() -> None:
    from monai.apps.datasets import DecathlonDataset

    assert {task.folder for task in TASKS} == set(DecathlonDataset.md5) == set(DecathlonDataset.resource)
    for task in TASKS:
        labels = dict.fromkeys(("background", *task.classes), 0)
        assert tolerance_of(task.dataset, {"labels": labels}) == task.tolerance
    assert {find_task(word).number for word in ("4", "04", "task04", "hippocampus", TASK)} == {4}
    with pytest.raises(UserError, match="the Decathlon has no task 'Task11'"):
        find_task("Task11")


def test_a_task_is_fetched_and_converted(
    environment: Environment, task: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apple(archive: tarfile.TarFile) -> None:
        add(archive, f"./._{TASK}")
        add(archive, f"./{TASK}/imagesTr/._hippocampus_000.nii.gz")

    server.content = pack(task, tmp_path / "task.tar", apple)
    server.cut = len(server.content) // 2 + 1
    md5 = hashlib.md5(server.content).hexdigest()
    monkeypatch.chdir(environment.root)
    monkeypatch.setattr("nnssl_ext.study.decathlon.download.time.sleep", lambda _: None)
    fetch, convert = (line.split()[1:] for line in shown_lines("docs/how-to/decathlon.md", "decathlon")[1:3])
    fetch += ["--url", server.url, "--md5", md5]
    got = environment.root / "msd" / TASK
    (got.parent / f".{TASK}.killed.tmp").mkdir(parents=True)  # a killed call's
    main(fetch)
    assert len(server.asked) == 2
    assert sorted(path.name for path in got.parent.iterdir()) == [f".{TASK}.lock", TASK]
    assert sorted(str(p.relative_to(got)) for p in got.rglob("*")) == sorted(
        str(p.relative_to(task)) for p in task.rglob("*")
    )
    main(fetch)  # there already
    assert len(server.asked) == 2

    main(convert)
    raw = environment.root / "raw" / DATASET
    assert len(list((raw / "imagesTs").iterdir())) == 2
    assert json.loads((raw / "dataset.json").read_text())["labels"]["Posterior"] == 2
    assert [path.name for path in raw.parent.iterdir()] == [DATASET]
    with pytest.raises(UserError, match="is there already"):
        main(convert)
    raw.rename(raw.with_name("Dataset004_Other"))
    with pytest.raises(UserError, match="its number is taken by Dataset004_Other"):
        main(convert)


def test_the_published_checksum_is_asked_for(task: Path, server: Server, tmp_path: Path) -> None:
    server.content = pack(task, tmp_path / "task.tar")
    with pytest.raises(UserError, match="expected 9d24dba78a72977dbd1d2e110310f31b"):
        main(["msd", "fetch", "Task04", "-o", str(tmp_path / "got"), "--url", server.url])
    assert [path.name for path in (tmp_path / "got").iterdir()] == [f".{TASK}.lock"]


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../escaped", tarfile.REGTYPE, ""),
        (f"{TASK}/../../escaped", tarfile.REGTYPE, ""),
        ("/tmp/nnssl_ext_escaped", tarfile.REGTYPE, ""),
        ("elsewhere/file", tarfile.REGTYPE, ""),
        (f"{TASK}/link", tarfile.SYMTYPE, "../../escaped"),
        (f"{TASK}/link", tarfile.SYMTYPE, "/etc"),
        (f"{TASK}/link", tarfile.LNKTYPE, "../escaped"),
        (f"{TASK}/device", tarfile.CHRTYPE, ""),
    ],
)
def test_a_hostile_tar_is_refused(task: Path, tmp_path: Path, name: str, kind: bytes, link: str) -> None:
    pack(task, tmp_path / "task.tar", lambda archive: add(archive, name, kind, link))
    (tmp_path / "got").mkdir()
    with pytest.raises(UserError, match="cannot unpack"):
        unpack(tmp_path / "task.tar", TASK, tmp_path / "got")
    assert not list((tmp_path / "got").iterdir())
    assert not Path("/tmp/nnssl_ext_escaped").exists()


@pytest.fixture
def predictions(environment: Environment, task: Path, tmp_path: Path) -> Path:
    """Good predictions of the converted task's test images."""
    main(["msd", "convert", str(task)])
    folder = tmp_path / "predictions" / "Task04"
    for image in (environment.root / "raw" / DATASET / "imagesTs").iterdir():
        labels = (volume(0) > 50).astype(np.uint8) * 2
        write_image(folder / image.name.replace("_0000", ""), labels, (1.0, 1.0, 2.0))
    (folder / "dataset.json").write_text("{}")  # nnU-Net leaves such files there
    return folder


def submit(predictions: Path) -> Path:
    archive = predictions.parent / "submission.zip"
    main(["msd", "submit", f"Task04={predictions}", "-o", str(archive)])
    return archive


def test_the_archive(
    predictions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(shown_lines("docs/how-to/decathlon.md", "decathlon")[-1].split()[1:])
    with zipfile.ZipFile("submission.zip") as archive:
        assert archive.namelist() == [f"{TASK}/hippocampus_007.nii.gz", f"{TASK}/hippocampus_008.nii.gz"]
        archive.extractall(tmp_path / "sent")
    for path in (tmp_path / "sent" / TASK).iterdir():
        image = SimpleITK.ReadImage(str(path))
        assert image.GetSize() == (16, 14, 12)
        assert image.GetSpacing() == (1.0, 1.0, 2.0)
        assert set(np.unique(SimpleITK.GetArrayFromImage(image))) == {0, 2}
    said = capsys.readouterr().err
    assert "130 test cases of these tasks are published" in said
    assert "evaluates archives of all 10 tasks" in said


@pytest.mark.parametrize(
    ("array", "spacing", "message"),
    [
        (np.full((12, 14, 16), 3, np.uint8), (1.0, 1.0, 2.0), r"has values 3, the labels are \[0, 1, 2\]"),
        (np.full((12, 14, 16), 0.5, np.float32), (1.0, 1.0, 2.0), "has values 0.5"),
        (np.zeros((12, 14, 15), np.uint8), (1.0, 1.0, 2.0), r"has size \(15, 14, 12\), its image has \(16, 14, 12\)"),
        (np.zeros((12, 14, 16), np.uint8), (1.0, 1.0, 1.0), "has spacing"),
    ],
)
def test_a_prediction_that_does_not_fit_is_not_sent(
    predictions: Path, array: np.ndarray, spacing: tuple[float, ...], message: str
) -> None:
    write_image(predictions / "hippocampus_008.nii.gz", array, spacing)
    with pytest.raises(UserError, match=f"1 predictions cannot be sent: hippocampus_008 {message}"):
        submit(predictions)
    assert not (predictions.parent / "submission.zip").exists()


def test_missing_and_foreign_predictions(predictions: Path) -> None:
    whole = (predictions / "hippocampus_008.nii.gz").read_bytes()
    (predictions / "hippocampus_009.nii.gz").write_bytes(whole)
    with pytest.raises(UserError, match="1 predictions of Task04_Hippocampus have no image: hippocampus_009"):
        submit(predictions)
    for case in ("008", "009"):
        (predictions / f"hippocampus_{case}.nii.gz").unlink()
    with pytest.raises(UserError, match="are missing: hippocampus_008"):
        submit(predictions)
    (predictions / "hippocampus_008.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="hippocampus_008 cannot be read"):
        submit(predictions)


def test_predict_says_what_is_missing(environment: Environment, predictions: Path) -> None:
    with pytest.raises(UserError, match="has no finished fold 0, 1, 2, 3, 4. Train it, or name the folds with -f"):
        main(["msd", "predict", "Task04", "-c", "3d_fullres", "-o", str(predictions)])
    with pytest.raises(UserError, match="no test images in"):
        main(["msd", "predict", "Task05", "-c", "3d_fullres", "-o", str(predictions)])


def test_predict_calls_stock_with_every_fold(
    environment: Environment, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = environment.results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold in range(5):
        (model / f"fold_{fold}").mkdir(parents=True)
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
    called: list[list[str]] = []
    monkeypatch.setattr("nnssl_ext.study.decathlon.tasks.run_stock", lambda words, *_, **__: called.append(words))
    words = ["msd", "predict", "Task04", "-c", "3d_fullres", "-device", "cpu"]
    five, one = environment.root / "five", environment.root / "one"
    main([*words, "-o", str(five)])
    main([*words, "-o", str(one), "-f", "0", "--disable_tta"])
    images = environment.root / "raw" / DATASET / "imagesTs"
    common = "-c 3d_fullres -p nnUNetPlans -tr nnUNetTrainer -f"
    assert [" ".join(words) for words in called] == [
        f"nnUNetv2_predict -d 4 -i {images} -o {five} {common} 0 1 2 3 4 -device cpu --continue_prediction",
        f"nnUNetv2_predict -d 4 -i {images} -o {one} {common} 0 -device cpu --continue_prediction --disable_tta",
    ]
    main([*words, "-o", str(five)])  # goes on
    for folder in (one, predictions):  # with other folds, or nobody knows whose predictions
        with pytest.raises(UserError, match="holds predictions of another model"):
            main([*words, "-o", str(folder)])
    assert len(called) == 3


def test_a_prediction_that_a_kill_tore_is_made_again(tmp_path: Path) -> None:
    for name in ("whole", "torn"):
        write_image(tmp_path / f"{name}.nii.gz", volume(0))
    torn = tmp_path / "torn.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-100])
    _remove_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.nii.gz"]
