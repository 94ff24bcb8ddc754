"""nnssl_ext features, as a user runs it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from nnssl_ext.cli import main
from nnssl_ext.data.cases import open_case
from nnssl_ext.errors import UserError
from nnssl_ext.features.cases import image_cases
from nnssl_ext.features.classify import read_labels
from nnssl_ext.features.results import _classify
from nnssl_ext.networks.backbone import backbone_of
from tests.conftest import Environment
from tests.transfer.files import nnssl_file
from tests.transfer.helpers import built, noise, planned

Data = Callable[[str], Environment]
#: One patch holds each case of the data set.
PATCH = [24, 24, 24]
CASES = 6


@pytest.fixture
def labelled(with_data: Data) -> Environment:
    environment = with_data("labelled")
    plans = environment.plans("labelled")
    plans["configurations"]["3d_fullres"]["patch_size"] = PATCH
    (environment.dataset("labelled") / "nnUNetPlans.json").write_text(json.dumps(plans))
    for file in environment.dataset("labelled").rglob("case_*"):
        if int(file.name[5:7]) >= CASES:
            file.unlink()
    return environment


@pytest.fixture
def weights(labelled: Environment) -> Path:
    """A checkpoint as stock nnU-Net writes it."""
    path = labelled.root / "checkpoint_final.pth"
    dataset = json.loads((labelled.dataset("labelled") / "dataset.json").read_text())
    arguments = {"plans": labelled.plans("labelled"), "configuration": "3d_fullres", "dataset_json": dataset, "fold": 0}
    network = noise(built(planned()))
    torch.save({"network_weights": network.state_dict(), "init_args": arguments, "trainer_name": "nnUNetTrainer"}, path)
    return path


def features(weights: Path, *words: str | Path) -> int:
    return main(["features", str(weights), *map(str, words), "-device", "cpu"])


def images(environment: Environment) -> Path:
    return environment.dataset("labelled") / "imagesTr"


def padded(image: np.ndarray) -> torch.Tensor:
    sides = [(PATCH[axis] - edge) for axis, edge in enumerate(image.shape[1:])]
    return torch.from_numpy(np.pad(image, [(0, 0), *((side // 2, side - side // 2) for side in sides)])).float()


def test_vectors_are_the_encoders_output(labelled: Environment, weights: Path) -> None:
    """By hand: preprocessed case, padded to the patch, through the network, mean over the case's voxels."""
    assert features(weights, "-d", "817", "-o", labelled.root / "out", "--stage", "all") == 0
    table = pd.read_csv(labelled.root / "out" / "features.csv").set_index(["case", "stage"])
    assert len(table) == 3 * CASES
    network = noise(built(planned())).eval()
    folder = labelled.dataset("labelled") / "nnUNetPlans_3d_fullres"
    for case in ("case_00", "case_05"):
        image = open_case(folder, case)[:]
        share = padded(np.ones_like(image))
        with torch.no_grad():
            expected = backbone_of(network).features(padded(image)[None])
        for stage, found in enumerate(expected):
            weight = torch.nn.functional.avg_pool3d(share, PATCH[0] // found.shape[2])
            mean = (found[0] * weight).sum((1, 2, 3)) / weight.sum()
            values = table.loc[(case, stage)].filter(regex=r"^f\d+$").dropna().to_numpy(float)
            assert values == pytest.approx(mean.numpy(), rel=1e-5, abs=1e-5)


def test_images_and_the_data_set_give_the_same(labelled: Environment, weights: Path) -> None:
    out = [labelled.root / name for name in ("a", "b")]
    features(weights, "-d", "817", "-o", out[0])
    features(weights, "-i", images(labelled), "-o", out[1])
    assert (out[0] / "features.csv").read_bytes() == (out[1] / "features.csv").read_bytes()
    content = json.loads((out[1] / "features.json").read_text())
    assert content["checkpoint"]["kind"] == "nnU-Net, nnUNetTrainer"
    assert content["stages"] == [{"stage": 2, "stride": [4, 4, 4], "channels": 12, "columns": 12}]
    assert content["cases"] == [f"case_{number:02d}" for number in range(CASES)]
    assert {row["action"] for row in content["matched"]["rows"] if row["encoder"]} == {"copied"}
    for name in ("features.png", "map.png"):
        assert (out[1] / name).read_bytes().startswith(b"\x89PNG")


def test_regions_of_labels(labelled: Environment, weights: Path) -> None:
    """The data set's own labels have names; the same files as masks give the same vectors by number."""
    first, second = labelled.root / "a", labelled.root / "b"
    features(weights, "-d", "817", "-o", first, "--pool", "mask")
    masks = labelled.dataset("labelled") / "gt_segmentations"
    features(weights, "-i", images(labelled), "-o", second, "--pool", "mask", "--mask", masks)
    named, numbered = (pd.read_csv(out / "features.csv") for out in (first, second))
    assert set(named["region"]) == {"image", "organ", "tumour"}
    numbered["region"] = numbered["region"].replace({"1": "organ", "2": "tumour"})
    pd.testing.assert_frame_equal(named, numbered)


def test_maps_lie_on_the_images(labelled: Environment, weights: Path) -> None:
    features(weights, "-i", images(labelled), "-o", labelled.root / "a", "--stage", "1", "--maps")
    features(weights, "-i", images(labelled), "-o", labelled.root / "b", "--stage", "1", "--maps", "2")
    image = nibabel.Nifti1Image.from_filename(images(labelled) / "case_03_0000.nii.gz")
    for out, channels in (("a", 8), ("b", 2)):
        found = nibabel.Nifti1Image.from_filename(labelled.root / out / "maps" / "case_03_stage1.nii.gz")
        assert found.shape == (*image.shape, channels)
        assert found.affine == pytest.approx(image.affine)
        assert np.isfinite(found.get_fdata()).all()
    assert len(list((labelled.root / "a" / "maps").iterdir())) == CASES


def test_a_second_call_goes_on(labelled: Environment, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished cases are kept, changed ones are done again, damaged ones are named and do not end the others."""
    folder, out = images(labelled), labelled.root / "out"
    damaged = folder / "case_04_0000.nii.gz"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    with pytest.raises(UserError, match="case case_04 cannot be preprocessed.*finished cases are kept") as error:
        features(weights, "-i", folder, "-o", out)
    assert "\n" not in str(error.value)
    assert len(pd.read_csv(out / "features.csv")) == CASES - 1
    times = {path.name: path.stat().st_mtime_ns for path in (out / "cases").iterdir()}
    damaged.write_bytes(content)
    (folder / "case_02_0000.nii.gz").write_bytes((folder / "case_03_0000.nii.gz").read_bytes())
    assert features(weights, "-i", folder, "-o", out) == 0
    again = {path.name for path in (out / "cases").iterdir() if times.get(path.name) != path.stat().st_mtime_ns}
    assert again == {"case_02.npz", "case_04.npz"}
    table = pd.read_csv(out / "features.csv").set_index("case").filter(regex=r"^f\d")
    assert table.loc["case_02"].tolist() == table.loc["case_03"].tolist()
    assert not list(out.rglob("*.tmp"))


def test_an_image_of_nan_is_named_in_each_call_and_ends_no_other(labelled: Environment, weights: Path) -> None:
    out = labelled.root / "out"
    file = labelled.dataset("labelled") / "nnUNetPlans_3d_fullres" / "case_04.b2nd"
    blosc2.asarray(np.full((1, 20, 24, 22), np.nan, np.float32), urlpath=str(file), mode="w")
    for _ in range(2):
        with pytest.raises(UserError, match="case case_04: Expected finite values"):
            features(weights, "-d", "817", "-o", out)
        assert pd.read_csv(out / "features.csv")["case"].tolist() == [f"case_{n:02d}" for n in (0, 1, 2, 3, 5)]
    with np.load(out / "cases" / "case_00.npz") as stored:
        earlier = dict(stored)
    # as an earlier version kept it
    np.savez(out / "cases" / "case_00.npz", **{**earlier, "stage2": np.full_like(earlier["stage2"], np.nan)})
    with pytest.raises(UserError, match="case case_04: Expected finite values"):
        features(weights, "-d", "817", "-o", out)
    with np.load(out / "cases" / "case_00.npz") as stored:
        assert np.array_equal(stored["stage2"], earlier["stage2"])


def test_failures_are_named_before_anything_else_fails(
    labelled: Environment, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled.root / "labels.csv").write_text("case,label\nother,a\n")
    words = ("-i", images(labelled), "-o", labelled.root / "out")
    (images(labelled) / "case_04_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="Expected labels of the extracted cases"):
        features(weights, *words, "--classify", labelled.root / "labels.csv")
    assert "case case_04 cannot be preprocessed: " in capsys.readouterr().err
    for file in images(labelled).iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"case case_00 cannot be preprocessed: .* and 5 more cases failed"):
        features(weights, *words)


def test_classification(labelled: Environment, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"case_{number:02d},{'a' if number % 2 else 'b'}" for number in range(CASES)]
    (labelled.root / "labels.csv").write_text("\n".join(["case,label", *rows]))
    words = ("--classify", labelled.root / "labels.csv", "--group-by", r"case_(\d+)")
    features(weights, "-d", "817", "-o", labelled.root / "out", "--pool", "octants", *words)
    scores = pd.read_csv(labelled.root / "out" / "classification.csv")
    assert scores["classifier"].tolist() == ["logistic regression", "nearest neighbors"]
    assert scores["cases"].tolist() == scores["groups"].tolist() == [CASES, CASES]
    assert ((scores["low"] <= scores["accuracy"]) & (scores["accuracy"] <= scores["high"])).all()
    assert capsys.readouterr().out.count("chance 0.500") == 2
    assert pd.read_csv(labelled.root / "out" / "features.csv").shape == (CASES, 3 + 8 * 12)


def test_parquet_or_a_line_about_it(
    labelled: Environment, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnssl_ext.features.results.find_spec", lambda _: None)
    features(weights, "-d", "817", "-o", labelled.root / "out", "--parquet")
    assert "pyarrow is not installed: features.csv is written instead" in capsys.readouterr().out
    assert (labelled.root / "out" / "features.csv").is_file()


def test_other_layouts_need_plans(labelled: Environment) -> None:
    file = labelled.root / "nnssl.pth"
    nnssl_file(file, "plain")
    with pytest.raises(UserError, match="Expected plans in nnssl.pth, got none .nnssl adaptation plan"):
        features(file, "-i", images(labelled), "-o", labelled.root / "out")
    plans = labelled.dataset("labelled") / "nnUNetPlans.json"
    assert features(file, "-i", images(labelled), "-o", labelled.root / "out", "-p", plans) == 0
    assert len(pd.read_csv(labelled.root / "out" / "features.csv")) == CASES


@pytest.mark.parametrize("name", ["os.system", "torch.nn.functional.torch.hub.load", "subprocess.Popen"])
def test_plans_in_a_checkpoint_run_no_foreign_code(labelled: Environment, weights: Path, name: str) -> None:
    content = torch.load(weights, weights_only=True)
    content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name
    torch.save(content, weights)
    with pytest.raises(UserError, match=f"Expected classes of .*, got '{name}'"):
        features(weights, "-i", images(labelled), "-o", labelled.root / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "9"], r"got '9'. Choose from 0 \(stride 1x1x1, 4 channels\)"),
        (["--mask", "somewhere"], "Expected --pool mask with --mask"),
        (["--batch", "0"], "Expected --batch of at least 1"),
        (["--maps=-1"], "Expected --batch of at least 1 and --maps of at least 0"),
        (["-c", "2d_fullres"], "have no configuration '2d_fullres'"),
        (["--pool", "mask"], "Expected a label map of each case, got none of case_00"),
        (["--pool", "mask", "--mask", "."], "Expected a mask for each case"),
        (["-p", "absent.json"], "cannot read absent.json"),
    ],
)
def test_unusable_command_lines(
    labelled: Environment, weights: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(labelled.root)
    with pytest.raises(UserError, match=message) as error:
        features(weights, "-i", images(labelled), "-o", "out", *words)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_made_is_named(labelled: Environment, weights: Path) -> None:
    (labelled.root / "file").touch()
    with pytest.raises(UserError, match="expected a folder that can be written for .*, got .*: Not a directory"):
        features(weights, "-i", images(labelled), "-o", labelled.root / "file" / "out")


def test_unusable_folders(labelled: Environment, weights: Path) -> None:
    empty = labelled.root / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="Expected images .*nii.gz.* got none"):
        features(weights, "-i", empty, "-o", labelled.root / "out")
    os.link(images(labelled) / "case_00_0000.nii.gz", empty / "x_0001.nii.gz")
    with pytest.raises(UserError, match="Expected 1 channels of case x, got x_0001.nii.gz"):
        features(weights, "-i", empty, "-o", labelled.root / "out")


def test_features_of_other_settings_are_kept(labelled: Environment, weights: Path) -> None:
    features(weights, "-d", "817", "-o", labelled.root / "out")
    with pytest.raises(UserError, match='Expected pool "mean" as in .*, got "max". Give another -o'):
        features(weights, "-d", "817", "-o", labelled.root / "out", "--pool", "max")


def test_one_region_that_cannot_be_classified_stops_no_other(
    labelled: Environment, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"case_{number:02d},{'a' if number % 2 else 'b'}" for number in range(CASES)]
    (labelled.root / "labels.csv").write_text("\n".join(["case,label", *rows]))
    table = [("case_00", "rare", 0, np.zeros(3)), *((f"case_{n:02d}", "image", 0, np.full(3, n)) for n in range(CASES))]
    known = read_labels(labelled.root / "labels.csv", None)
    _classify(labelled.root, table, known)
    assert "rare, stage 0, is not classified: " in capsys.readouterr().out
    assert set(pd.read_csv(labelled.root / "classification.csv")["region"]) == {"image"}
    _classify(labelled.root, [*table[:-1], ("other", "image", 0, np.zeros(3))], known)
    printed = capsys.readouterr().out
    assert "1 cases are without a label: other" in printed
    assert f"1 cases are labeled, but not extracted: case_{CASES - 1:02d}" in printed
    with pytest.raises(UserError):
        _classify(labelled.root, table[:1], known)
    with pytest.raises(UserError, match="Expected --classify with --group-by, got none"):
        features(weights, "-d", "817", "-o", labelled.root / "out", "--group-by", "x")


def test_preprocessed_cases_need_no_raw_data(
    labelled: Environment, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    assert features(weights, "-d", "817", "-o", labelled.root / "out") == 0


def test_a_file_may_hold_all_channels(tmp_path: Path) -> None:
    """As RGB. A case that lacks a channel of several files is named."""
    plans = SimpleNamespace(
        channels=3, plans=SimpleNamespace(image_reader_writer_class=SimpleNamespace(supported_file_endings=[".png"]))
    )
    for name in ("a_0000.png", "b_0000.png"):
        (tmp_path / name).touch()
    assert [case.name for case in image_cases(tmp_path, plans)] == ["a", "b"]  # type: ignore[arg-type]
    (tmp_path / "b_0001.png").touch()
    with pytest.raises(UserError, match="Expected 3 channels of case a, got a_0000.png"):
        image_cases(tmp_path, plans)  # type: ignore[arg-type]
