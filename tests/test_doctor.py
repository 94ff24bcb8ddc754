"""Every trouble the doctor names is planted here."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnssl_ext import doctor
from nnssl_ext.cli import main
from nnssl_ext.doctor import Finding, _raw_images, examine_dataset, examine_environment, write_report
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.resources import resource_folder
from tests.conftest import Environment
from tests.volumes import write_image

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
        monkeypatch.setattr(doctor, "version", lambda n, f=found: f if n == "nnunetv2" else original(n))
        assert message in troubles()["nnunetv2"]

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert "is not installed -> pip install" in troubles()["nnunetv2"]


@pytest.mark.parametrize(
    ("torch", "torchvision", "message"),
    [
        ("2.6.0", "missing", "torchvision missing"),
        ("2.6.0", "0.29.2", "is made for torch"),
        ("2.15.0+cpu", "0.29.2+cu132", "is another build than torch 2.15.0"),
    ],
)
def test_torchvision(monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str, message: str) -> None:
    requirement = "torch (==2.15.0)" if torch.startswith("2.15") else "torch==2.15.0; extra == 'x'"
    monkeypatch.setattr(doctor, "requires", lambda _: ["numpy", requirement])
    (found,) = doctor._torchvision(torch, torchvision)
    assert message in found.trouble
    assert "same index" in found.advice


def test_trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = os.environ["nnUNet_extTrainer"]
    monkeypatch.delenv("nnUNet_extTrainer")
    assert "nnssl_ext trainers" in troubles()["nnUNet_extTrainer"]
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "absent"))
    found = [f.trouble for f in examine_environment() if f.subject == "nnUNet_extTrainer"]
    assert "which is no folder" in found[0]
    assert "does not name our trainers" in found[1]
    (tmp_path / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnsslTrainer_VolumeFusion(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}:{ours}")
    assert "is another class of that name" in troubles()["nnsslTrainer_VolumeFusion"]


def test_data_set(with_data: Data) -> None:
    environment = with_data("plain")
    folder = environment.dataset("plain")
    assert dataset_troubles() == []
    assert dataset_troubles("999") == [
        f"data set 999: expected one data set Dataset999_* in {folder.parent}, found none. Plan and preprocess it first"
    ]

    environment.write_plans("plain", "wrong", {"crop_size": [16, 18, 16]})
    assert any("wrong, 3d_fullres" in t and "crop edge 18" in t for t in dataset_troubles())
    (folder / "wrong.json").unlink()

    path = folder / "nnUNetPlans_3d_fullres" / "case_01.b2nd"
    path.write_bytes(b"")
    (trouble,) = dataset_troubles()
    assert "case case_01: cannot be read" in trouble
    shutil.move(folder / "nnUNetPlans_3d_fullres", folder / "nnUNetPlans_3d_lowres")
    plans = read_json(folder / "nnUNetPlans.json")
    low = {"inherits_from": "3d_fullres", "data_identifier": "nnUNetPlans_3d_lowres"}
    write_json({**plans, "configurations": {**plans["configurations"], "3d_lowres": low}}, folder / "nnUNetPlans.json")
    assert not any("is not preprocessed" in trouble for trouble in dataset_troubles())  # another configuration is
    shutil.rmtree(folder / "nnUNetPlans_3d_lowres")
    assert any("is not preprocessed (nnUNetPlans_3d_fullres is missing)" in t for t in dataset_troubles())
    (folder / "nnUNetPlans.json").unlink()
    assert dataset_troubles() == ["Dataset811_Plain: has no plans"]
    (folder / "dataset_fingerprint.json").unlink()
    assert dataset_troubles() == ["Dataset811_Plain: dataset_fingerprint.json is missing"]


def test_cases_that_a_training_refuses(with_data: Data) -> None:
    """No cases, and cases of other channels."""
    data = with_data("plain").dataset("plain") / "nnUNetPlans_3d_fullres"
    (data / "case_01.b2nd").unlink()
    blosc2.asarray(np.random.default_rng(0).random((2, 8, 8, 8)), urlpath=str(data / "case_01.b2nd"))
    subject = "Dataset811_Plain, nnUNetPlans, 3d_fullres"
    assert dataset_troubles() == [f"{subject}, case case_01: has 2 channels, the plans expect 1"]
    shutil.rmtree(data)
    data.mkdir()
    assert dataset_troubles() == [f"{subject}: has no case in nnUNetPlans_3d_fullres"]


def test_the_command_fails_with_a_trouble(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "TROUBLE  nnUNet_results: is not set" in printed
    assert "-> export nnUNet_results=" in printed
    assert printed.endswith("1 problem found\n")


def test_a_users_failing_module_is_named_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nnU-Net imports every module in front of ours, and a script may end the program."""
    (tmp_path / "broken.py").write_text("import not_installed_here\n")
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "sound.py").write_text("VALUE = 1\n")
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}:{resource_folder('trainers')}/")
    found = troubles()
    assert found.keys() == {str(tmp_path / "broken.py"), str(tmp_path / "script.py")}
    assert "ModuleNotFoundError: No module named 'not_installed_here'" in found[str(tmp_path / "broken.py")]
    assert "sound" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_findings_come_as_they_are_found_and_all_of_them(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_data("plain").dataset("plain")
    path = folder / "dataset.json"
    sound = path.read_bytes()
    monkeypatch.setenv("nnUNet_n_proc_DA", "abc")
    path.write_bytes(b"\xef\xbb\xbf" + sound)
    assert main(["doctor", "-d", "811"]) == 1
    printed = capsys.readouterr().out
    assert "  ok  nnUNet_raw" in printed
    assert "TROUBLE  nnUNet_n_proc_DA: is 'abc'" in printed
    assert "dataset.json: begins with a byte-order mark" in printed
    assert "3d_fullres: all cases of nnUNetPlans_3d_fullres can be read" in printed
    path.write_bytes(sound.replace(b"{", b'{"name": "\xfc", ', 1))  # Latin-1
    main(["doctor", "-d", "811"])
    assert "is not valid JSON in UTF-8" in capsys.readouterr().out


def test_inheriting_configurations_and_plans_of_other_data_sets(with_data: Data) -> None:
    environment = with_data("plain")

    def inherit(plans: dict) -> None:
        plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}
        plans["configurations"]["circle"] = {"inherits_from": "circle"}
        plans["dataset_name"] = "Dataset004_Other"

    environment.write_plans("plain", "renamed", {}, lambda plans: plans.update(plans_name="nnUNetPlans"))
    environment.write_plans("plain", "other", {}, inherit)
    found = {f.subject: f for f in examine_dataset("811")}
    assert found["Dataset811_Plain, other, mine, Rotation"].state.startswith("crop (")
    assert "Circular dependency" in found["Dataset811_Plain, other, circle"].trouble
    assert "are for Dataset004_Other" in found["Dataset811_Plain, other"].trouble
    assert "have the plans_name 'nnUNetPlans'" in found["Dataset811_Plain, renamed"].trouble


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 0, 64 << 20))
    assert "has only 0.06 GiB" in troubles()["/dev/shm"]


def test_the_report_has_no_paths_and_no_names(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("plain")
    folder = environment.dataset("plain").rename(environment.preprocessed / "Dataset811_Doe-John")
    (folder / "nnUNetPlans_3d_fullres" / "case_01.b2nd").rename(folder / "nnUNetPlans_3d_fullres" / "Doe_J.b2nd")
    (folder / "nnUNetPlans_3d_fullres" / "Doe_J.b2nd").write_bytes(b"")
    assert main(["doctor", "-d", "811", "--report", str(tmp_path / "report.txt")]) == 1
    text = (tmp_path / "report.txt").read_text()
    assert "Doe" not in text
    assert str(tmp_path) not in text
    assert "<path>" in text
    assert re.findall(r"(?<![\w<>.])/\w[\w./-]*", text) == []
    assert "Dataset811_<name>" in text
    assert "nnunetv2: 2." in text


def test_the_report_replaces_names_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case may be called 3, and one of several trainers' folders may have a space."""
    folder = tmp_path / "Jane Doe" / "trainers"
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([".", str(tmp_path), f"{folder}/"]))
    problem = f"cannot be read (no file of case '3' in /data/3.b2nd or {tmp_path}/3_seg.b2nd, 3 bytes)"
    findings = [
        Finding("Python", "3.13.3"),
        Finding("set, case 3", "", problem, "preprocess the case again"),
        Finding(f"{folder}/mine.py", "", "cannot be imported", "repair it"),
        Finding("set, case 3_John", "", "is constant", "preprocess the case again"),
        Finding("set", "", str(OSError(2, "No such file", r"C:\Jane Doe\raw")), "repair it"),
    ]
    write_report(findings, str(tmp_path / "report.txt"))
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert lines[0] == "  ok  Python: 3.13.3"
    assert lines[1] == (
        "TROUBLE  set, case <case>: cannot be read (no file of case '<case>' in <path> or "
        "<nnUNet_extTrainer>/<case>_seg.b2nd, 3 bytes)"
    )
    assert lines[3] == "TROUBLE  <nnUNet_extTrainer>/mine.py: cannot be imported"
    assert lines[5] == "TROUBLE  set, case <case>: is constant"
    assert lines[7] == "TROUBLE  set: [Errno 2] No such file: '<path>'"


def test_no_command_of_ours_takes_torch_that_need_not() -> None:
    """``methods`` and ``doctor`` answer in a fraction of a second; torch alone takes more than one."""
    program = "import sys; from nnssl_ext.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for command in ("methods", "trainers", "doctor"):
        subprocess.run([sys.executable, "-c", program, command], check=True, capture_output=True)


def test_raw_images_that_are_cut_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    for part in ("imagesTr", "labelsTr"):
        path = write_image(tmp_path / "Dataset001_X" / part / "a.nii.gz", np.random.default_rng(0).random((4, 9, 9)))
    assert [str(finding) for finding in _raw_images("Dataset001_X")] == [
        "  ok  Dataset001_X: 2 raw files are not cut short"
    ]
    path.write_bytes(path.read_bytes()[:-300])
    (found,) = _raw_images("Dataset001_X")
    assert found.trouble
    assert "case a.nii.gz" in found.subject
