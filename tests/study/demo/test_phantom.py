import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.errors import UserError
from nnssl_ext.study.demo.phantom import IGNORE_LABEL, ORGANS, PhantomOptions, make_case, write_phantom

SMALL = PhantomOptions(cases=6, labeled=2, test=2, field_of_view=24.0)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_is_a_raw_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset900_Phantom"
    write_phantom(folder, SMALL)
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == 6
    assert content["labels"] == {"background": 0, **{o: i for i, o in enumerate(ORGANS, 1)}, "ignore": IGNORE_LABEL}
    labels = {p.name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(p))) for p in (folder / "labelsTr").iterdir()}
    assert len(labels) == 6
    splits = json.loads((folder / "splits_final.json").read_text())
    assert [(len(s["train"]), len(s["val"])) for s in splits] == [(2, 2), (4, 2)]
    assert splits[0]["val"] == splits[1]["val"]
    assert not set(splits[1]["train"]) & set(splits[1]["val"])
    unlabelled = set(splits[1]["train"]) - set(splits[0]["train"])
    for name, label in labels.items():
        hidden = name.split(".")[0] in unlabelled
        assert (label == IGNORE_LABEL).all() == hidden
        assert (label == IGNORE_LABEL).any() == hidden
        image = SimpleITK.ReadImage(str(folder / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz")))
        assert SimpleITK.GetArrayFromImage(image).shape == label.shape


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_phantom(tmp_path / name, PhantomOptions(cases=3, labeled=1, test=1, seed=seed, field_of_view=16.0))
    first, second, third = (hashes(tmp_path / name) for name in "abc")
    assert first == second
    assert first["imagesTr/phantom_000_0000.nii.gz"] != third["imagesTr/phantom_000_0000.nii.gz"]


def test_a_case_does_not_depend_on_the_others() -> None:
    few, many = PhantomOptions(cases=20), PhantomOptions(cases=500, labeled=100)
    for a, b in zip(make_case(few, 7), make_case(many, 7), strict=True):
        assert np.array_equal(a, b)


def test_organs_are_there_vary_and_the_twins_look_alike() -> None:
    cases = [make_case(PhantomOptions(), number) for number in range(8)]
    sizes = np.array([[(label == organ).sum() for organ in range(1, len(ORGANS) + 1)] for _, label in cases])
    assert (sizes[:, :4] > 50).all()  # a lesion may be absent
    assert (sizes.std(0) / sizes.mean(0) > 0.15).all()
    left = np.concatenate([image[0][label == 2] / image[0][label > 0].mean() for image, label in cases])
    right = np.concatenate([image[0][label == 3] / image[0][label > 0].mean() for image, label in cases])
    assert abs(left.mean() - right.mean()) < 0.5 * left.std()


def test_no_threshold_solves_it() -> None:
    """An organ's intensities overlap the rest of the body's so far that no intensity alone tells them apart."""
    image, label = make_case(PhantomOptions(), 1)
    for organ in range(1, len(ORGANS) + 1):
        inside, outside = image[0][label == organ], image[0][(label != organ) & (image[0] > 200)]
        best = 0.0
        for low in np.quantile(outside, np.linspace(0, 0.99, 40)):
            hits, false = (inside > low).sum(), (outside > low).sum()
            best = max(best, 2 * hits / (hits + false + inside.size))
        assert best < 0.8


def test_anisotropy_and_channels() -> None:
    image, label = make_case(PhantomOptions(channels=2, spacing=(4.0, 1.0, 1.0)), 0)
    assert image.shape[0] == 2
    assert image.shape[1:] == label.shape
    assert 9 <= label.shape[0] <= 14
    assert label.shape[1] > 40
    assert np.corrcoef(image[0][label > 0], image[1][label > 0])[0, 1] < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PhantomOptions(cases=5, labeled=4, test=2), "a phantom of 5 cases with 4 labeled and 2 test cases cannot"),
        (PhantomOptions(channels=0), "channels must be at least 1"),
        (PhantomOptions(spacing=(0.0, 1.0, 1.0)), "spacings between 0 and 6 mm"),
    ],
)
def test_refuses(tmp_path: Path, options: PhantomOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_phantom(tmp_path / "new", options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists. Remove it"):
        write_phantom(tmp_path, SMALL)
