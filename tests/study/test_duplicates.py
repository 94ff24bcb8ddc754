"""Held-out images that stand elsewhere under another name."""

import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import blosc2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnssl_ext.cli import main
from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json
from nnssl_ext.study.duplicates import describe, find_duplicates, same_content, signature
from nnssl_ext.study.inputs import held_out_and_pool, without_duplicates
from tests.conftest import Environment
from tests.datasets import blob

Data = Callable[[str], Environment]


def write(
    folder: Path,
    case: str,
    seed: int,
    scale: float = 1.0,
    cut: int = 0,
    order: tuple[int, ...] = (0, 1, 2),
    mirror: int = 1,
    column: int = 0,
) -> None:
    generator = np.random.default_rng(seed)
    texture = gaussian_filter(generator.standard_normal((60, 40, 40)), 1.5)
    image = scale * (blob(generator, (60, 40, 40)) + 4 * texture) + scale - 1
    image = image[:, :, column : column + 36].transpose(order)[::mirror, ::mirror]
    folder.mkdir(parents=True, exist_ok=True)
    blosc2.asarray(
        np.ascontiguousarray(image[None, cut:], dtype=np.float32), urlpath=str(folder / f"{case}.b2nd"), mode="w"
    )


def found_in(corpus: Path, target: Path, held_out: list[str]) -> dict[str, str]:
    return find_duplicates(corpus, list(list_cases(corpus)), target, held_out)


def test_duplicates_are_found_by_content(tmp_path: Path) -> None:
    """Another name, another scale of intensities and one slice less change nothing. Another subject is none."""
    target, corpus = tmp_path / "target", tmp_path / "corpus"
    for number in range(4):
        write(target, f"t{number}", number)
    write(corpus, "renamed", 2)
    write(corpus, "scaled", 3, scale=2.5)
    write(corpus, "shorter", 1, cut=1)
    write(corpus, "another", 9)
    assert found_in(corpus, target, ["t1", "t2", "t3"]) == {
        "renamed": "t2",
        "scaled": "t3",
        "shorter": "t1",
    }
    assert found_in(corpus, target, ["t0"]) == {}


def test_duplicates_are_found_in_any_order_and_direction_of_axes(tmp_path: Path) -> None:
    """Readers differ in it: DICOM and NIfTI of one scan are often mirrored."""
    target, corpus = tmp_path / "target", tmp_path / "corpus"
    for number in range(3):
        write(target, f"t{number}", number)
    write(corpus, "mirrored", 1, mirror=-1)
    write(corpus, "turned", 2, order=(2, 0, 1), mirror=-1)
    write(corpus, "another", 9, order=(2, 0, 1))
    assert found_in(corpus, target, ["t0", "t1", "t2"]) == {
        "mirrored": "t1",
        "turned": "t2",
    }


def test_another_cut_of_an_image_is_a_duplicate(tmp_path: Path) -> None:
    """Cut around labels that differ, the same exam lies some voxels apart."""
    target, corpus = tmp_path / "target", tmp_path / "corpus"
    for number in range(3):
        write(target, f"t{number}", number)
    write(corpus, "moved", 1, column=3)
    write(corpus, "another", 9, column=3)
    assert found_in(corpus, target, ["t0", "t1", "t2"]) == {"moved": "t1"}


def test_constant_cases_are_no_duplicates() -> None:
    flat = describe(np.zeros((8, 8, 8), np.float32))
    assert not same_content(flat, flat, list(permutations(range(3))))


def test_signatures_do_not_depend_on_the_grid(tmp_path: Path) -> None:
    write(tmp_path, "a", 0)
    image = np.asarray(blosc2.open(str(tmp_path / "a.b2nd"))[:])
    fine = np.repeat(np.repeat(np.repeat(image, 2, 1), 2, 2), 2, 3)
    blosc2.asarray(fine, urlpath=str(tmp_path / "b.b2nd"), mode="w")
    write(tmp_path, "c", 1)
    one, two, other = (signature(tmp_path, case) for case in "abc")
    assert one.detail.shape == two.detail.shape == (32, 32, 32)
    assert same_content(one, two, list(permutations(range(3))))
    assert not same_content(one, other, list(permutations(range(3))))


def test_a_case_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "a", 0)
    (tmp_path / "b.b2nd").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"Case 'b' in .* cannot be read .* Preprocess it again\."):
        find_duplicates(tmp_path, ["b"], tmp_path, ["a"])


def test_a_study_does_not_train_on_its_held_out_images(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out exam that the data set holds twice is neither a labeled case nor an image to pretrain on."""
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    source = environment.dataset("labelled")
    held_out, pool = held_out_and_pool(source, source / "nnUNetPlans_3d_fullres", 0)
    for file in (source / "nnUNetPlans_3d_fullres").glob(f"{held_out[0]}[._]*"):
        shutil.copyfile(file, file.with_name(file.name.replace(held_out[0], pool[0], 1)))
    words = ["study", "-d", "817", "-c", "3d_fullres", "-device", "cpu", "--methods", "scratch", "VolumeFusion"]
    words += ["--labels", "2", "all", "--subsets", "1", "--steps", "2", "--total-baseline", "0", "--rates", "0.01"]
    main([*words, "-o", "st", "--report-only"])
    assert read_json(Path("st/study.json"))["labels"] == [2, len(pool) - 1]
    (splits,) = Path("st").rglob("splits_final.json")
    trained = [fold["train"] for fold in read_json(splits, list)]
    assert max(trained, key=len) == pool[1:]
    assert not any(pool[0] in cases for cases in trained)
    assert f"{pool[0]} = {held_out[0]}." in Path("st/report.md").read_text()


def test_all_cases_of_a_duplicates_group_are_left_out(tmp_path: Path) -> None:
    """A second scan of a held-out subject looks different, and its group tells."""
    for number, case in enumerate(("held", "p1_a", "p1_b", "p2_a")):
        write(tmp_path, case, 0 if case == "p1_a" else number)
    pool = ["p1_a", "p1_b", "p2_a"]
    assert without_duplicates(tmp_path, pool, ["held"], "") == (["p1_b", "p2_a"], {"p1_a": "held"})
    left, found = without_duplicates(tmp_path, pool, ["held"], r"(p\d)_")
    assert (left, found) == (["p2_a"], {"p1_a": "held", "p1_b": "held"})
