import os
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnssl_ext.data import index as index_module
from nnssl_ext.data.cases import list_cases, open_case, shorten
from nnssl_ext.data.index import CaseIndex, CaseRecord, body_map, copy_index
from tests.datasets import blob


def write(folder: Path, case: str, data: np.ndarray) -> None:
    blosc2.asarray(np.ascontiguousarray(data), urlpath=str(folder / f"{case}.b2nd"), mode="w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "nnUNetPlans_3d_fullres"
    result.mkdir()
    generator = np.random.default_rng(0)
    for case in range(3):
        write(result, f"case_{case}", blob(generator, (20, 18, 8 + case))[None])
        write(result, f"case_{case}_seg", np.zeros((1, 20, 18, 8 + case), np.int8))
    return result


def test_lists_images_only_and_opens_them_lazily(folder: Path) -> None:
    np.savez(folder / "case_9.npz", data=np.ones((1, 2, 3, 4)), seg=np.zeros((1, 2, 3, 4)))
    assert list(list_cases(folder)) == ["case_0", "case_1", "case_2", "case_9"]
    assert open_case(folder, "case_1").shape == (1, 20, 18, 9)
    assert open_case(folder, "case_9").shape == (1, 2, 3, 4)
    np.save(folder / "case_9.npy", np.zeros((1, 2, 3, 4)))
    assert isinstance(open_case(folder, "case_9"), np.memmap)
    with pytest.raises(FileNotFoundError, match="case 'absent'"):
        open_case(folder, "absent")


def test_records_shape_and_body(folder: Path) -> None:
    index = CaseIndex.build(folder)
    assert index.cases == ["case_0", "case_1", "case_2"]
    record = index["case_2"]
    assert record.shape == (1, 20, 18, 10)
    assert record.body.shape == (16, 16, 10)
    assert record.problem == ""
    # the body is an ellipsoid: its middle is body, a corner is air
    assert record.body[8, 8, 5]
    assert not record.body[0, 0, 0]


def test_reads_a_case_once_and_again_when_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[str] = []
    original = index_module.examine

    def counted(f: Path, case: str) -> CaseRecord:
        examined.append(case)
        return original(f, case)

    monkeypatch.setattr(index_module, "examine", counted)
    first = CaseIndex.build(folder)
    assert len(examined) == 3
    examined.clear()
    again = CaseIndex.build(folder)
    assert examined == []
    assert np.array_equal(again["case_1"].body, first["case_1"].body)
    assert again["case_1"].shape == first["case_1"].shape

    write(folder, "case_1", np.ones((1, 4, 4, 4)))
    write(folder, "case_3", blob(np.random.default_rng(1), (5, 6, 7))[None])
    changed = CaseIndex.build(folder)
    assert sorted(examined) == ["case_1", "case_3"]
    assert changed.problems() == {"case_1": "is constant"}


def test_nothing_is_written_into_nnunets_folder(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    CaseIndex.build(folder)
    assert sorted(os.listdir(folder)) == before


def test_names_what_is_wrong(folder: Path) -> None:
    write(folder, "constant", np.full((2, 4, 4, 4), 3.0))
    image = np.random.default_rng(0).random((1, 4, 4, 4))
    image[0, 1, 1, 1] = np.nan
    write(folder, "nan", image)
    write(folder, "flat", image[0])
    content = (folder / "case_0.b2nd").read_bytes()
    (folder / "truncated.b2nd").write_bytes(content[: len(content) // 2])
    (folder / "empty.b2nd").write_bytes(b"")
    problems = CaseIndex.build(folder, workers=2).problems()
    assert problems["constant"] == "is constant"
    assert problems["nan"] == "holds NaN or infinite values"
    assert "shape (4, 4, 4)" in problems["flat"]
    assert problems["truncated"].startswith("cannot be read")
    assert problems["empty"].startswith("cannot be read")
    assert len(problems) == 5


def test_a_repaired_case_is_looked_at_again(folder: Path) -> None:
    path = folder / "case_0.b2nd"
    good, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"0" * len(good))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "case_0" in CaseIndex.build(folder).problems()
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not CaseIndex.build(folder).problems()


def test_a_damaged_index_is_made_anew(folder: Path) -> None:
    CaseIndex.build(folder)
    path = folder.parent / f"nnssl_ext_index_{folder.name}.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert CaseIndex.build(folder)["case_0"].shape == (1, 20, 18, 8)


def test_an_index_that_cannot_be_kept_is_no_obstacle(folder: Path) -> None:
    # a folder in the index's place: not even root can replace it by a file
    (folder.parent / f"nnssl_ext_index_{folder.name}.npz").mkdir()
    with pytest.warns(UserWarning, match="could not be kept"):
        index = CaseIndex.build(folder)
    assert index["case_0"].shape == (1, 20, 18, 8)


def test_body_of_a_case_without_air() -> None:
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 8))
    assert body_map(image).any()


def test_shorten() -> None:
    assert shorten("abc", 5) == "a, b, c"
    assert shorten("abcdefg", 5) == "a, b, c, d, e and 2 more"


def test_unpacked_cases_are_the_same_cases(folder: Path) -> None:
    """nnU-Net unpacks .npz when a training starts, and a later call finds both."""
    array = np.random.default_rng(0).random((1, 8, 8, 8)).astype(np.float32)
    np.savez_compressed(folder / "case_9.npz", data=array, seg=array)
    before = CaseIndex.build(folder).fingerprint()
    np.save(folder / "case_9.npy", array)
    np.save(folder / "case_9_seg.npy", array)
    assert CaseIndex.build(folder).fingerprint() == before


def test_an_index_of_an_earlier_version_is_made_anew(folder: Path) -> None:
    expected = CaseIndex.build(folder)["case_0"].body
    path = folder.parent / f"nnssl_ext_index_{folder.name}.npz"
    with np.load(path) as stored:
        content = {**stored, "version": 1, "body": np.zeros_like(stored["body"])}
    np.savez(path, **content)
    assert np.array_equal(CaseIndex.build(folder)["case_0"].body, expected)
    assert expected.any()


def test_the_body_is_found_in_images_of_any_size() -> None:
    """Every (size / 100,000)-th voxel would be the first column, which is air."""
    image = np.random.default_rng(0).random((1, 1000, 100, 8), dtype=np.float32)
    image[..., 4:] += 10
    image[..., 0] = 0
    assert body_map(image).mean() == 0.5


def test_a_link_to_nowhere_is_a_case_that_cannot_be_read(folder: Path) -> None:
    (folder / "case_7.b2nd").symlink_to(folder / "absent.b2nd")
    assert list_cases(folder)["case_7"] == (0, 0)
    assert CaseIndex.build(folder).problems()["case_7"].startswith("cannot be read")


def test_cases_of_other_channels_than_expected_are_problems(folder: Path) -> None:
    write(folder, "case_1", np.random.default_rng(0).random((2, 4, 4, 4)))
    index = CaseIndex.build(folder)
    assert index.problems() == {}
    assert index.problems(channels=1) == {"case_1": "has 2 channels, the plans expect 1"}
    assert index.problems(channels=2)["case_0"] == "has 1 channels, the plans expect 2"


def test_a_link_takes_the_index_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = CaseIndex.build(folder)
    link = tmp_path / "study" / folder.name
    link.parent.mkdir()
    link.symlink_to(folder)
    copy_index(folder, link.parent)
    monkeypatch.setattr(index_module, "examine", None)  # no case is read
    assert CaseIndex.build(link).fingerprint() == known.fingerprint()
