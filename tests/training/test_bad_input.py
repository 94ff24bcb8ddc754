"""Bad input: one clear line, status 1, nothing half-written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.data.cases import stored_as
from nnssl_ext.errors import UserError
from tests.conftest import Environment
from tests.support.runs import cases, pretrain

Data = Callable[[str], Environment]


def refused(
    environment: Environment,
    match: str,
    kind: str = "plain",
    fold: str = "0",
    configuration: str = "3d_fullres",
) -> None:
    """The run is refused with one line, before any results folder exists."""
    with pytest.raises(UserError, match=match) as error:
        pretrain(environment, kind, "run", fold, configuration)
    assert "\n" not in str(error.value)
    assert not list(environment.results.glob("*"))
    assert not (environment.dataset(kind) / "splits_final.json").exists()


@pytest.fixture
def plain(with_data: Data) -> Environment:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {})
    return environment


def test_two_dimensional(plain: Environment) -> None:
    refused(plain, "configuration '2d' is 2-D; pretrain 3d_fullres", configuration="2d")


def test_cascade(plain: Environment) -> None:
    refused(plain, "'3d_cascade_fullres' is a cascade stage", configuration="3d_cascade_fullres")


def test_unknown_configuration(plain: Environment) -> None:
    refused(plain, "have no configuration '3d_fulres'. They have 2d, 3d_fullres", configuration="3d_fulres")


def test_crop_edge(plain: Environment) -> None:
    plain.write_plans("plain", "run", {"crop_size": [16, 18, 16]})
    refused(plain, r"plans run, .*crop edge 18 \(axis 1 of \(16, 18, 16\)\).*multiple of 4.*use 16 or 20")


def test_patch_edge_of_a_residual_plan(with_data: Data) -> None:
    def thin(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["patch_size"] = [4, 16, 16]

    environment = with_data("residual")
    environment.write_plans("residual", "run", {}, thin)
    refused(environment, r"crop edge 4 .*at least 8; use 8", kind="residual")


def test_unknown_network(plain: Environment) -> None:
    def other(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["architecture"] = {
            "network_class_name": "tests.training.test_bad_input.Unknown",
            "_kw_requires_import": [],
            "arch_kwargs": {"strides": [[1, 1, 1]]},
        }

    plain.write_plans("plain", "run", {}, other)
    refused(
        plain,
        "cannot pretrain a network of type tests.training.test_bad_input.Unknown. Expected PlainConvUNet",
    )


class Unknown(torch.nn.Module):
    def __init__(self, **_: object) -> None:
        super().__init__()


def test_truncated_case(plain: Environment) -> None:
    path = cases(plain) / "case_03.b2nd"
    path.write_bytes(path.read_bytes()[:1000])
    refused(plain, r"nnUNetPlans_3d_fullres: case 'case_03' cannot be read .*. Preprocess these cases again")


def test_several_bad_cases_are_all_named(plain: Environment) -> None:
    for case in range(3):
        (cases(plain) / f"case_0{case}.b2nd").write_bytes(b"")
    refused(plain, "case 'case_00' .* case 'case_01' .* case 'case_02'")


def test_no_case(plain: Environment) -> None:
    for path in cases(plain).iterdir():
        path.unlink()
    refused(plain, "no case in .*. Run nnUNetv2_preprocess")
    cases(plain).rmdir()
    refused(plain, "no preprocessed data in .*. Run nnUNetv2_preprocess")


def test_one_case(plain: Environment) -> None:
    for path in cases(plain).iterdir():
        if "case_00" not in path.name:
            path.unlink()
    refused(plain, "fold 0 needs at least 5 cases, .* has 1. Use fold 'all'")
    refused(plain, "needs at least 2 training cases, fold all .* has 1", fold="all")
    plain.write_plans("plain", "run", {"epochs": 1, "volume_fusion": {"foreground_case": "same"}})
    assert (pretrain(plain, "plain", "run", "all") / "checkpoint_final.pth").is_file()


def test_unknown_and_ill_typed_settings(plain: Environment) -> None:
    plain.write_plans("plain", "run", {"epoch": 3})
    refused(plain, "plans run: unknown setting 'epoch'; did you mean 'epochs'?")
    plain.write_plans("plain", "run", {"volume_fusion": {"layers": 3}})
    refused(plain, r"unknown setting 'volume_fusion\.layers'")
    plain.write_plans("plain", "run", {"volume_fusion": {"levels": "four"}})
    refused(plain, r"setting 'volume_fusion\.levels' must be int, got 'four' \(str\)")
    plain.write_plans("plain", "run", {"target_trainer": "nnUNetTrainerAbsent"})
    refused(plain, "target_trainer: trainer 'nnUNetTrainerAbsent' was not found by nnU-Net")


@pytest.mark.parametrize("name", ["nnsslTrainer_Finetune", "nnsslTrainer_Probe", "nnsslTrainer_Rotation"])
def test_a_target_trainer_that_builds_the_target_trainers_network(plain: Environment, name: str) -> None:
    plain.write_plans("plain", "run", {"target_trainer": name})
    refused(plain, f"plans run: target_trainer: expected a trainer with a network of its own, got '{name}'")


def test_split_that_names_absent_cases(plain: Environment) -> None:
    path = plain.dataset("plain") / "splits_final.json"
    path.write_text('[{"train": ["case_00", "case_77"], "val": []}]')
    with pytest.raises(UserError, match="names cases that are not preprocessed: case_77"):
        pretrain(plain, "plain", "run")
    path.write_text('[{"train": ["case_00"], "val": ["case_78"]}]')
    with pytest.raises(UserError, match="names cases that are not preprocessed: case_78"):
        pretrain(plain, "plain", "run")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"splits_final\.json must hold a JSON list, got dict"):
        pretrain(plain, "plain", "run")
    assert not list(plain.results.glob("*"))


def test_unwritable_results(plain: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    # a file where a folder should be stops root too
    shutil.rmtree(plain.results)
    plain.results.write_text("")
    monkeypatch.setenv("nnUNet_results", str(plain.results / "below"))
    with pytest.raises(UserError, match=r"nnUNet_results=.*below cannot be written: .*results: is not a folder"):
        pretrain(plain, "plain", "run")


def test_results_variable_not_set(plain: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    refused(plain, "nnUNet_results is not set. Export it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(plain: Environment) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args

    with pytest.raises(UserError, match="no CUDA device was found. Use -device cpu"):
        get_trainer_from_args("811", "3d_fullres", 0, "nnsslTrainer_VolumeFusion", "run")


@pytest.mark.parametrize("ending", ["txt", "npz"])
def test_files_of_other_kinds(plain: Environment, ending: str) -> None:
    (cases(plain) / f"old.{ending}").touch()
    refused(plain, rf"expected cases in .b2nd files or in .npz files, got case_.*b2nd, old.{ending}. Move other")


def test_packed_cases_in_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", data=np.zeros(1))
    stored_as(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is read-only, and nnU-Net unpacks a.npz there"):
        stored_as(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(1))
    stored_as(tmp_path)
