"""Pretraining on a corpus that holds a held-out case under another name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from nnssl_ext.cli import main
from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.corpus import pretraining_data
from tests.conftest import Environment

Data = Callable[[str], Environment]
NAME = "Dataset830_Corpus"


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
    target_plans = read_json(target / "nnUNetPlans.json")
    target_plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    write_json(target_plans, target / "ct.json")
    write_json({**plans, "plans_name": "ct"}, corpus / "ct.json")
    with pytest.raises(UserError, match=r"differ in spacing, normalization_schemes, intensities\."):
        pretraining_data("830", target, "ct", "3d_fullres", ["x00"])
    plans["transpose_forward"] = [2, 0, 1]
    write_json(plans, corpus / "nnUNetPlans.json")
    with pytest.raises(
        UserError, match=r"differ in spacing, transpose_forward\. Make the corpus with nnssl_ext corpus --like"
    ):
        pretraining_data("830", target, "nnUNetPlans", "3d_fullres", ["x00"])
