import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.cli import main
from nnssl_ext.data.cases import list_cases, open_case
from nnssl_ext.data.corpus import sources as corpus_sources
from nnssl_ext.data.corpus.sources import NotRead, Wishes, items_of
from nnssl_ext.errors import UserError
from tests.conftest import Environment
from tests.data.corpus.test_corpus import data, folder, make
from tests.volumes import volume, write_image

WithData = Callable[[str], Environment]


@pytest.fixture
def raw(environment: Environment) -> Path:
    """An nnU-Net raw data set of two channels, with a case each in imagesTr and imagesTs; its label is no image."""
    folder = environment.root / "raw" / "Dataset820_Two"
    for part, case in (("imagesTr", "x"), ("imagesTs", "y")):
        for channel in range(2):
            seed = channel + 10 * (case == "y")
            write_image(folder / part / f"{case}_{channel:04d}.nii.gz", volume(seed))
    write_image(folder / "labelsTr" / "x.nii.gz", (volume(0) > 50).astype(np.uint8))
    content = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz", "labels": {"background": 0}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    folder = tmp_path / "Task01_Two"
    write_image(folder / "imagesTr" / "x.nii.gz", np.stack([volume(0), volume(1)]))
    write_image(folder / "labelsTr" / "x.nii.gz", (volume(0) > 50).astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "FLAIR", "1": "T2"}}))
    return folder


def channels(rows: dict) -> list[str]:
    return sorted("+".join(row["channels"]) for row in rows["volumes"] if row["status"] == "kept")


def test_each_channel_is_a_case_for_a_target_of_one(with_data: WithData, raw: Path, decathlon: Path) -> None:
    with_data("plain")
    made = make("820", decathlon)
    # the Decathlon's channels are the same volumes as those of case x
    assert channels(made) == ["T1", "T1", "T2", "T2"]
    assert made["counts"] == {"kept": 4, "duplicate": 2, "unusable": 0, "no image": 0}


def test_channels_are_selected_by_name(with_data: WithData, raw: Path, decathlon: Path) -> None:
    with_data("plain")
    # seen by two names, its T2 is that of case x
    assert channels(make(raw, decathlon, "--channels", "T2")) == ["T2", "T2"]
    # asking for another channel reads the file again
    made = make(raw, decathlon, "--channels", "T2", "--channels", f"{decathlon.name}=flair")
    assert channels(made) == ["FLAIR", "T2", "T2"]


def test_a_target_of_two_channels(with_data: WithData, raw: Path, decathlon: Path, tmp_path: Path) -> None:
    environment = with_data("two_channel")
    with pytest.raises(UserError, match=r"has channels 'T1', 'T2', the target has 'MR0', 'MR1'. Name which to take"):
        make(raw, like="814")
    made = make(raw, "--channels", "T2,T1", like="814")
    assert made["counts"]["kept"] == 2
    (case,) = [row["case"] for row in made["volumes"] if row["files"][0].endswith("x_0001.nii.gz")]
    stored = open_case(data(), case)[:]
    first = (volume(1) - volume(1).mean()) / volume(1).std()
    np.testing.assert_allclose(stored[0], first, atol=1e-4)
    write_image(tmp_path / "single" / "a.nii.gz", volume(3))
    with pytest.raises(UserError, match=r"has channels '', the target has"):
        make(tmp_path / "single", like="814")
    assert environment


def test_channels_of_different_sizes_and_absent_ones(with_data: WithData, raw: Path) -> None:
    with_data("two_channel")
    write_image(raw / "imagesTr" / "x_0001.nii.gz", volume(1, (12, 14, 15)))
    (raw / "imagesTs" / "y_0000.nii.gz").unlink()
    with pytest.raises(UserError, match="no volume of the sources can be used"):
        make(raw, "--channels", "T1,T2", "--max-failures", "100", like="814")
    rows = json.loads((data().parent / "corpus.json").read_text())["volumes"]
    assert ["channels of different size" in row["reason"] for row in rows] == [True, False]
    assert "cannot be read: No such file" in rows[1]["reason"]


def test_a_decathlon_file_that_does_not_fit_its_json(with_data: WithData, decathlon: Path) -> None:
    with_data("plain")
    write_image(decathlon / "imagesTr" / "y.nii.gz", np.stack([volume(5)] * 3))
    made = make(decathlon, "--max-failures", "60")
    assert [row["reason"] for row in made["volumes"] if row["status"] == "unusable"] == [
        "does not fit its dataset.json: 3 volumes in 1 file, expected 2"
    ]


def test_normalization_by_source(with_data: WithData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")

    def ct(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]

    environment.write_plans("plain", "nnUNetPlans", {}, ct)
    for name in ("ct", "mr"):
        write_image(tmp_path / name / f"{name}.nii.gz", volume(len(name) + (name == "mr")))
    made = make(tmp_path / "ct", tmp_path / "mr", "--normalization", "mr=ZScoreNormalization")
    assert {Path(row["files"][0]).name: row["normalization"] for row in made["volumes"]} == {
        "ct.nii.gz": "",
        "mr.nii.gz": "ZScoreNormalization",
    }
    values = {case[:2]: np.asarray(open_case(data(), case)[:]) for case in list_cases(data())}
    # the plan clips to [0, 1] and divides by 1
    assert (values["ct"].min(), values["ct"].max()) == (0.0, 1.0)
    assert values["mr"].std() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(UserError, match="unknown scheme. Known: CTNormalization"):
        make(tmp_path / "ct", "--normalization", "ct=Histogram")
    with pytest.raises(UserError, match="--normalization names 'pet', which is no source"):
        make(tmp_path / "ct", "--normalization", "pet=NoNormalization")
    capsys.readouterr()


def test_duplicates_are_normalized_anew_when_asked(with_data: WithData, tmp_path: Path) -> None:
    environment = with_data("plain")

    def ct(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]

    environment.write_plans("plain", "nnUNetPlans", {}, ct)
    for name in ("scans/one", "scans/two", "more/three"):
        write_image(tmp_path / f"{name}.nii.gz", volume(1))
    make(tmp_path / "scans", tmp_path / "more")

    def deviation() -> float:
        (case,) = list_cases(data())
        return float(np.asarray(open_case(data(), case)[:]).std())

    assert deviation() < 0.9
    words: list[str | Path] = [tmp_path / "scans", tmp_path / "more", "--normalization", "scans=ZScoreNormalization"]
    made = make(*words)
    assert deviation() == pytest.approx(1.0, abs=1e-4)
    assert [row["normalization"] for row in made["volumes"] if row["status"] == "kept"] == ["ZScoreNormalization"]
    assert made["counts"]["duplicate"] == 2
    assert make(*words) == made
    back = make(*words[:2])
    assert deviation() < 0.9
    assert [row["normalization"] for row in back["volumes"] if row["status"] == "kept"] == [""]


def test_the_targets_own_images_are_pointed_out(
    with_data: WithData, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_data("plain")
    make(raw)
    assert "own training images" not in capsys.readouterr().err
    make(raw.rename(raw.with_name("Dataset811_Plain")))
    assert "note: Dataset811_Plain's own training images are in the corpus" in capsys.readouterr().err


def test_labels_are_never_read(with_data: WithData, raw: Path) -> None:
    with_data("plain")
    (raw / "labelsTr" / "x.nii.gz").write_text("unreadable")
    wishes = Wishes(("MR",), {}, {})
    assert not [item for item in items_of(str(raw), wishes) if "labelsTr" in item.files[0]]
    (raw / "dataset.json").unlink()  # now a plain folder
    assert not [item for item in items_of(str(raw), wishes) if "labelsTr" in item.files[0]]


def test_descriptions_from_elsewhere_are_data(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = Wishes(("MR",), {}, {})
    file = raw / "dataset.json"
    whole = json.loads(file.read_text())
    names: object
    for names in ([], ["T1"], "T1", None, {}):
        file.write_text(json.dumps({**whole, "channel_names": names}))
        with pytest.raises(UserError, match="expected channel_names as an object"):
            items_of(str(raw), wishes)
    file.write_text(json.dumps({**whole, "file_ending": "../../x"}))
    with pytest.raises(UserError, match="file_ending '../../x' cannot be read"):
        items_of(str(raw), wishes)
    monkeypatch.setattr(corpus_sources, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="refused \\(at most 10\\)"):
        items_of(str(raw), wishes)


def test_channels_stand_in_their_order_whatever_their_keys(raw: Path) -> None:
    file = raw / "dataset.json"
    whole = json.loads(file.read_text())
    for names in ({"a": "T1", "b": "T2"}, {"1": "T1", "0": "T2"}, {"1": "T1", "2": "T2"}):
        file.write_text(json.dumps({**whole, "channel_names": names}))
        (item,) = [
            item for item in items_of(str(raw), Wishes(("T2",), {"": ("T2",)}, {})) if "imagesTr" in item.files[0]
        ]
        assert (item.names, Path(item.files[0]).name) == (("T2",), "x_0001.nii.gz")


def test_a_target_whose_channels_have_other_keys(with_data: WithData, tmp_path: Path) -> None:
    environment = with_data("plain")
    file = environment.dataset("plain") / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"MR": "MR0"}}))
    write_image(tmp_path / "scans" / "a.nii.gz", volume(3))
    assert make(tmp_path / "scans")["counts"]["kept"] == 1


def test_data_sets_are_found_as_nnunet_finds_them(environment: Environment, raw: Path) -> None:
    for name, word in (("Dataset020_My-Data", "Dataset020_My-Data"), ("Dataset1020_Big", "1020")):
        raw = raw.rename(raw.with_name(name))
        items = items_of(word, Wishes(("MR",), {}, {}))
        assert len(items) == 4
        assert all(name in file for item in items for file in item.files)


def test_a_raw_data_set_of_nnunet_version_1(raw: Path) -> None:
    (raw / "dataset.json").write_text(json.dumps({"modality": {"0": "T1", "1": "T2"}, "training": []}))
    wishes = Wishes(("T1", "T2"), {}, {})
    items = items_of(str(raw.rename(raw.with_name("Task020_Old"))), wishes)
    assert [[Path(file).name for file in item.files] for item in items] == [
        ["x_0000.nii.gz", "x_0001.nii.gz"],
        ["y_0000.nii.gz", "y_0001.nii.gz"],
    ]


def test_numbered_cases_of_the_decathlon_are_no_channels(raw: Path) -> None:
    """AMOS and WORD number their cases as nnU-Net its channels."""
    (raw / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "training": []}))
    for file in (raw / "imagesTr").iterdir():
        file.unlink()
    shutil.rmtree(raw / "imagesTs")
    names = ["amos_0001.nii.gz", "amos_0004.nii.gz"]
    for name in names:
        (raw / "imagesTr" / name).touch()
    items = items_of(str(raw.rename(raw.with_name("amos"))), Wishes(("CT",), {}, {}))
    assert [Path(item.files[0]).name for item in items] == names


def test_version_1_may_have_more_channels_than_its_json(raw: Path) -> None:
    (raw / "dataset.json").write_text(json.dumps({"modality": {"0": "T1", "1": "T2"}, "training": []}))
    (raw / "imagesTr" / "x_0002.nii.gz").touch()
    not_read = NotRead()
    items = items_of(str(raw.rename(raw.with_name("Task020_Old"))), Wishes(("T1", "T2"), {}, {}), not_read)
    assert len(items) == 2
    assert [Path(name).name for name in not_read[corpus_sources.OTHER_NUMBER]] == ["x_0002.nii.gz"]


def test_channels_that_dataset_json_does_not_name_are_counted(raw: Path) -> None:
    not_read = NotRead()
    (raw / "imagesTr" / "x_0007.nii.gz").touch()
    items_of(str(raw), Wishes(("MR",), {}, {}), not_read)
    assert not_read == {corpus_sources.OTHER_NUMBER: [str(raw / "imagesTr" / "x_0007.nii.gz")]}


def test_a_missing_channel_number_is_named(raw: Path) -> None:
    wishes, not_read = Wishes(("MR",), {}, {}), NotRead()
    (raw / "imagesTr" / "x_0001.nii.gz").rename(raw / "imagesTr" / "z.nii.gz")
    assert len(items_of(str(raw), wishes, not_read)) == 4
    assert not_read == {corpus_sources.NO_NUMBER: [str(raw / "imagesTr" / "z.nii.gz")]}
    shutil.rmtree(raw / "imagesTs")
    (raw / "imagesTr" / "x_0000.nii.gz").rename(raw / "imagesTr" / "y.nii.gz")
    with pytest.raises(
        UserError, match=r"expected image names with a channel number, as CASE_0000.nii.gz, got .*z.nii.gz"
    ):
        items_of(str(raw), wishes)


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "B.NRRD", "c.MHA", "report.pdf", "x/more.PDF", "x/data.raw", "x/list", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path)
    not_read = NotRead()
    items = items_of(str(tmp_path), Wishes(("MR",), {}, {}), not_read)
    assert [Path(item.files[0]).name for item in items] == ["B.NRRD", "a.nii.gz", "c.MHA"]
    assert {kind: len(names) for kind, names in not_read.items()} == {
        ".pdf": 2,
        "links to folders": 1,
        "pipes or devices": 1,
        "without a suffix": 1,
    }
    with pytest.raises(UserError, match=r"no image found.*; got 1 .pdf \(.*more.PDF\), 1 without a suffix"):
        items_of(str(tmp_path / "x"), Wishes(("MR",), {}, {}))


def test_sources_that_are_none(with_data: WithData, tmp_path: Path) -> None:
    with_data("plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image found"):
        main(["corpus", "-d", "851", "-n", "Open", "--like", "811", str(tmp_path / "empty")])
    with pytest.raises(UserError, match="neither a file or folder nor a data set in nnUNet_raw"):
        main(["corpus", "-d", "851", "-n", "Open", "--like", "811", "899"])


def test_channels_of_equal_names_are_all_read() -> None:
    """Such as phases of CT: nnU-Net chooses the normalization by the name."""
    two, three = Wishes(("CT", "CT"), {}, {}), Wishes(("ct", "pet", "ct"), {}, {})
    assert two.groups("S", ("CT", "CT")) == ((0, 1),)
    assert three.groups("S", ("CT", "CT", "PET")) == ((0, 2, 1),)
    assert Wishes(("CT",), {"S": ("CT", "CT")}, {}).groups("S", ("CT", "CT")) == ((0,), (1,))
    with pytest.raises(UserError, match="S has channels 'CT', 'PET', the target has 'CT', 'CT'"):
        two.groups("S", ("CT", "PET"))


def test_channels_beside_ct_are_no_foreign_images(
    with_data: WithData, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only channels that the plan normalizes as CT are compared, in nnU-Net's spelling."""
    environment = with_data("two_channel")

    def ct(plans: dict) -> None:
        schemes = ["CTNormalization", "ZScoreNormalization"]
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = schemes

    environment.write_plans("two_channel", "nnUNetPlans", {}, ct)
    path = environment.dataset("two_channel") / "dataset.json"
    for names, foreign in ((("ct", "PET"), False), (("MR", "PET"), True)):
        described = {"channel_names": {"0": names[0], "1": names[1]}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **described}))
        (raw / "dataset.json").write_text(json.dumps({**json.loads((raw / "dataset.json").read_text()), **described}))
        shutil.rmtree(folder(), ignore_errors=True)
        make(raw, like="814")
        assert ("does not look like CT" in capsys.readouterr().err) == foreign


@pytest.mark.parametrize("source", ["raw", "decathlon"])
def test_a_corrected_order_of_channels_makes_the_cases_anew(
    with_data: WithData, source: str, request: pytest.FixtureRequest
) -> None:
    with_data("two_channel")
    path = request.getfixturevalue(source)
    names = ["T1", "T2"] if source == "raw" else ["FLAIR", "T2"]
    first = make(path, "--channels", ",".join(names), like="814")
    made = make(path, "--channels", ", ".join(reversed(names)), like="814")
    assert made["counts"] == first["counts"]
    assert channels(made) == ["+".join(reversed(names))] * made["counts"]["kept"]
    assert set(list_cases(data())) == {row["case"] for row in made["volumes"]}


def moved(path: Path, origin: tuple[float, ...], direction: tuple[float, ...]) -> None:
    """Change where an image lies."""
    image = SimpleITK.ReadImage(str(path))
    image.SetOrigin(origin)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))


def test_channels_must_have_the_same_directions(
    with_data: WithData, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net would stack a mirrored channel. It warns of another origin and goes on."""
    with_data("two_channel")
    moved(raw / "imagesTr" / "x_0001.nii.gz", (0, 0, 0), (-1, 0, 0, 0, 1, 0, 0, 0, 1))
    moved(raw / "imagesTs" / "y_0001.nii.gz", (3, 4, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    made = make(raw, "--channels", "T1,T2", "--max-failures", "50", like="814")
    mirrored, shifted = made["volumes"]
    assert "has channels turned by 180.0 degrees against each other (LPS and RPS)" in mirrored["reason"]
    assert shifted["remarks"] == ["its channels lie 5 mm apart and are stacked voxel by voxel"]
    assert "y_0000.nii.gz: its channels lie 5 mm apart" in capsys.readouterr().err


def test_channels_on_one_grid_have_no_remarks(with_data: WithData, raw: Path) -> None:
    """Headers of single precision differ in the last digits."""
    with_data("two_channel")
    tilt = 1e-3
    moved(raw / "imagesTr" / "x_0001.nii.gz", (0, 0, 1e-3), (1, -tilt, 0, tilt, 1, 0, 0, 0, 1))
    made = make(raw, "--channels", "T1,T2", like="814")
    assert [row["remarks"] for row in made["volumes"]] == [[], []]
