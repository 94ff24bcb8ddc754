"""Pretraining on a corpus that holds a held-out case under another name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import pytest

from nnssl_ext.cli import main
from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.corpus import find_twins, pretraining_data, same_content, signature
from tests.conftest import Environment
from tests.datasets import blob

Data = Callable[[str], Environment]
NAME = "Dataset830_Corpus"


def write(
    folder: Path,
    case: str,
    seed: int,
    scale: float = 1.0,
    cut: int = 0,
    order: tuple[int, ...] = (0, 1, 2),
    mirror: int = 1,
) -> None:
    image = scale * blob(np.random.default_rng(seed), (60, 40, 40)) + scale - 1
    image = image.transpose(order)[::mirror, ::mirror]
    folder.mkdir(parents=True, exist_ok=True)
    blosc2.asarray(
        np.ascontiguousarray(image[None, cut:], dtype=np.float32), urlpath=str(folder / f"{case}.b2nd"), mode="w"
    )


def test_twins_are_found_by_content(tmp_path: Path) -> None:
    """Another name, another scale of intensities and one slice less change nothing. Another subject is no twin."""
    target, corpus = tmp_path / "target", tmp_path / "corpus"
    for number in range(4):
        write(target, f"t{number}", number)
    write(corpus, "renamed", 2)
    write(corpus, "scaled", 3, scale=2.5)
    write(corpus, "shorter", 1, cut=1)
    write(corpus, "another", 9)
    assert find_twins(corpus, target, ["t1", "t2", "t3"]) == {"renamed": "t2", "scaled": "t3", "shorter": "t1"}
    assert find_twins(corpus, target, ["t0"]) == {}


def test_twins_are_found_in_any_order_and_direction_of_axes(tmp_path: Path) -> None:
    """Readers differ in it: DICOM and NIfTI of one scan are often mirrored."""
    target, corpus = tmp_path / "target", tmp_path / "corpus"
    for number in range(3):
        write(target, f"t{number}", number)
    write(corpus, "mirrored", 1, mirror=-1)
    write(corpus, "turned", 2, order=(2, 0, 1), mirror=-1)
    write(corpus, "another", 9, order=(2, 0, 1))
    assert find_twins(corpus, target, ["t0", "t1", "t2"]) == {"mirrored": "t1", "turned": "t2"}


def test_constant_cases_are_no_twins() -> None:
    flat = ((8, 8, 8), np.zeros((8, 8, 8), np.float32))
    assert not same_content(flat, flat)


def corpus_of(environment: Environment) -> tuple[Path, dict[str, str]]:
    """Copy the labeled data set under other names. Return the corpus, and its cases' former names."""
    source = environment.dataset("labelled")
    corpus = shutil.copytree(source, source.parent / NAME)
    write_json({**read_json(corpus / "dataset.json"), "name": "Corpus"}, corpus / "dataset.json")
    data = corpus / "nnUNetPlans_3d_fullres"
    former = {}
    for number, case in enumerate(sorted(list_cases(data), reverse=True)):
        former[f"x{number:02d}"] = case
        for file in data.glob(f"{case}[._]*"):
            file.rename(file.with_name(file.name.replace(case, f"x{number:02d}", 1)))
    return corpus, former


def test_a_study_leaves_its_held_out_cases_out_of_the_corpus(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    _, former = corpus_of(environment)
    words = ["study", "-d", "817", "-c", "3d_fullres", "-device", "cpu", "--methods", "scratch", "VolumeFusion"]
    words += ["--labels", "2", "--subsets", "1", "--steps", "2", "--total-baseline", "0", "--rates", "0.01"]
    words += ["--pretrain-on", "830", "-o", "st", "epochs=1", "iterations_per_epoch=2", "validation_iterations=1"]
    main(words)
    (folder,) = {file.parent for file in (environment.root / "st").rglob("left_out.json")}
    held_out = set(pd.read_csv(environment.root / "st" / "results.csv")["case"].str.removesuffix(".nii.gz"))
    left_out = read_json(folder / "left_out.json")
    assert held_out
    assert left_out == {name: case for name, case in former.items() if case in held_out}
    (split,) = read_json(folder / "splits_final.json", list)
    assert set(split["train"]) == set(former) - set(left_out)
    named = ", ".join(f"{case} = {twin}" for case, twin in left_out.items())
    assert f"Left out: {named}." in (environment.root / "st" / "report.md").read_text()


def test_a_corpus_that_does_not_fit_is_one_line(with_data: Data) -> None:
    environment = with_data("labelled")
    corpus, former = corpus_of(environment)
    target = environment.dataset("labelled")
    with pytest.raises(UserError, match="every case of Dataset830_Corpus is held out"):
        pretraining_data("830", target, "nnUNetPlans", "3d_fullres", sorted(former.values()))
    plans = read_json(corpus / "nnUNetPlans.json")
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    write_json(plans, corpus / "nnUNetPlans.json")
    with pytest.raises(UserError, match=r"differ in spacing\. Make the corpus with nnssl_ext corpus --like"):
        pretraining_data("830", target, "nnUNetPlans", "3d_fullres", ["x00"])
    plans["transpose_forward"] = [2, 0, 1]
    write_json(plans, corpus / "nnUNetPlans.json")
    with pytest.raises(
        UserError, match=r"differ in spacing, transpose_forward\. Make the corpus with nnssl_ext corpus --like"
    ):
        pretraining_data("830", target, "nnUNetPlans", "3d_fullres", ["x00"])


def test_signatures_do_not_depend_on_the_grid(tmp_path: Path) -> None:
    write(tmp_path, "a", 0)
    shape, means = signature(tmp_path, "a")
    assert shape == (60, 40, 40)
    assert means.shape == (8, 8, 8)
