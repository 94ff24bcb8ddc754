"""Every trouble the doctor names is planted here."""

import importlib.metadata
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from nnssl_ext import doctor
from nnssl_ext.cli import main
from nnssl_ext.doctor import examine_dataset, examine_environment
from tests.conftest import Environment

Data = Callable[[str], Environment]


def troubles() -> dict[str, str]:
    return {f.subject: f"{f.trouble} -> {f.advice}" for f in examine_environment() if f.trouble}


def dataset_troubles(dataset: str = "811") -> list[str]:
    found = [f for f in examine_dataset(dataset) if f.trouble]
    assert all(f.advice for f in found)
    return [f"{f.subject}: {f.trouble}" for f in found]


@pytest.fixture(autouse=True)
def sound(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")


def test_a_sound_environment_has_none(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(with_data("plain").dataset("plain") / "nnUNetPlans_3d_lowres")
    shutil.copytree(
        with_data("plain").dataset("plain") / "nnUNetPlans_3d_fullres",
        with_data("plain").dataset("plain") / "nnUNetPlans_3d_lowres",
    )
    assert troubles() == {}
    assert main(["doctor"]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("name", doctor.VARIABLES)
def test_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.delenv(name)
    assert "is not set" in troubles()[name]
    monkeypatch.setenv(name, str(tmp_path / "absent"))
    assert "which is no folder -> mkdir -p" in troubles()[name]


def test_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    assert "has only 0.0 GiB left" in troubles()["nnUNet_results"]


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, message in (("0", "planning fails"), ("many", "not a number")):
        monkeypatch.setenv("nnUNet_n_proc_DA", value)
        assert message in troubles()["nnUNet_n_proc_DA"]


def test_nnunet_version(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.version
    for found, message in (("2.6.0", "version 2.6.0 is not supported"), ("3.0", "version 3.0 is not supported")):
        monkeypatch.setattr(importlib.metadata, "version", lambda n, f=found: f if n == "nnunetv2" else original(n))
        assert message in troubles()["nnunetv2"]

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "is not installed -> pip install" in troubles()["nnunetv2"]


def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert "cannot be imported beside this torch" in troubles()["torchvision"]


def test_trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("nnUNet_extTrainer")
    assert "nnssl_ext trainers" in troubles()["nnUNet_extTrainer"]
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "absent"))
    found = troubles()
    assert "which is no folder" in found["nnUNet_extTrainer"]
    assert "is not found by nnU-Net" in found["nnsslTrainer_VolumeFusion"]
    (tmp_path / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnsslTrainer_VolumeFusion(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert "is another class of that name" in troubles()["nnsslTrainer_VolumeFusion"]


def test_data_set(with_data: Data) -> None:
    environment = with_data("plain")
    folder = environment.dataset("plain")
    assert dataset_troubles() == []
    assert dataset_troubles("999") == [
        f"data set 999: expected one data set Dataset999_* in {folder.parent}, found none; plan and preprocess it first"
    ]

    environment.write_plans("plain", "wrong", {"crop_size": [16, 18, 16]})
    assert any("wrong, 3d_fullres" in t and "crop edge 18" in t for t in dataset_troubles())
    (folder / "wrong.json").unlink()

    path = folder / "nnUNetPlans_3d_fullres" / "case_01.b2nd"
    path.write_bytes(b"")
    (trouble,) = dataset_troubles()
    assert "case case_01: cannot be read" in trouble
    shutil.rmtree(folder / "nnUNetPlans_3d_fullres")
    assert any("is not preprocessed (nnUNetPlans_3d_fullres is missing)" in t for t in dataset_troubles())
    (folder / "nnUNetPlans.json").unlink()
    assert dataset_troubles() == ["Dataset811_Plain: has no plans"]
    (folder / "dataset_fingerprint.json").unlink()
    assert dataset_troubles() == ["Dataset811_Plain: dataset_fingerprint.json is missing"]


def test_the_command_fails_with_a_trouble(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "TROUBLE  nnUNet_results: is not set" in printed
    assert "-> export nnUNet_results=" in printed
    assert printed.endswith("1 trouble\n")
