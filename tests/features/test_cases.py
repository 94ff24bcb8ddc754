"""Lists of cases, and what is read of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.features.cases import dataset_cases, image_cases, preprocess, region_names
from tests.volumes import write_image

IMAGE = np.random.default_rng(0).random((1, 4, 5, 6), dtype=np.float32)
LABELS = (IMAGE > 0.5).astype(np.int8)


@pytest.fixture
def plans() -> Any:
    reader = SimpleNamespace(supported_file_endings=[".nii.gz"])
    return SimpleNamespace(
        channels=1,
        configuration=SimpleNamespace(data_identifier="cases"),
        plans=SimpleNamespace(image_reader_writer_class=reader),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cases").mkdir()
    return tmp_path / "cases"


@pytest.mark.parametrize("unpacked", [False, True])
def test_labels_of_npz_cases_are_read(folder: Path, plans: Any, unpacked: bool) -> None:
    np.savez(folder / "a.npz", data=IMAGE, seg=LABELS)
    if unpacked:
        np.save(folder / "a.npy", IMAGE)
        np.save(folder / "a_seg.npy", LABELS)
    (case,) = dataset_cases(None, folder.parent, plans, original=False)
    found = preprocess(case, plans)
    assert found.labels is not None
    assert np.array_equal(found.image, IMAGE)
    assert np.array_equal(found.labels, LABELS[0])


def test_a_link_to_nowhere_is_a_case_that_cannot_be_preprocessed(folder: Path, plans: Any) -> None:
    (folder / "a.b2nd").symlink_to(folder / "absent.b2nd")
    (case,) = dataset_cases(None, folder.parent, plans, original=False)
    assert case.signature == ""
    with pytest.raises(UserError, match="case a cannot be preprocessed: no .b2nd"):
        preprocess(case, plans)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(folder: Path, plans: Any, value: float) -> None:
    image = np.where(IMAGE > 0.9, value, IMAGE)
    blosc2.asarray(image, urlpath=str(folder / "a.b2nd"))
    (case,) = dataset_cases(None, folder.parent, plans, original=False)
    with pytest.raises(UserError, match="case a: Expected finite values, got NaN or infinite ones"):
        preprocess(case, plans)


def test_four_digits_at_a_names_end_are_said_to_be_the_channel(folder: Path, plans: Any) -> None:
    for name in ("patient_1234.nii.gz", "patient_0005.nii.gz"):
        (folder / name).touch()
    with pytest.raises(UserError, match="of case patient, got .*, whose _1234 is read as the channel's number"):
        image_cases(folder, plans)


def test_hidden_files_are_no_cases(folder: Path, plans: Any) -> None:
    for name in ("A_0000.nii.gz", "._A_0000.nii.gz", "._B_0000.nii.gz"):
        (folder / name).touch()
    assert [case.name for case in image_cases(folder, plans)] == ["A"]


def test_a_list_of_one_label_is_a_label() -> None:
    assert region_names({"labels": {"background": 0, "RV": [1], "both": [1, 2]}}) == {0: "background", 1: "RV"}


def test_images_that_are_cut_short_are_refused(folder: Path, plans: Any) -> None:
    path = write_image(folder / "A_0000.nii.gz", IMAGE[0])
    path.write_bytes(path.read_bytes()[:-60])
    (case,) = image_cases(folder, plans)
    with pytest.raises(UserError, match=r"case A cannot be preprocessed: .*A_0000.nii.gz .*. Copy or convert it again"):
        preprocess(case, plans)
