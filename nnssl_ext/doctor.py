"""What can be wrong with an installation or a data set, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext import __version__
from nnssl_ext.environment import named_trainer_folders
from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.recipe import read_json, total_stride
from nnssl_ext.resources import resource_folder

#: Below this much free space a checkpoint or a preprocessed data set may not fit.
LOW_DISK_GIB = 5.0
VARIABLES = {
    "nnUNet_raw": "raw data sets, for planning and preprocessing",
    "nnUNet_preprocessed": "preprocessed data sets, for training",
    "nnUNet_results": "checkpoints and logs",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``trouble`` '' means it is well, ``advice`` says what to do."""

    subject: str
    state: str
    trouble: str = ""
    advice: str = ""

    def __str__(self) -> str:
        if not self.trouble:
            return f"  ok  {self.subject}: {self.state}"
        return f"TROUBLE  {self.subject}: {self.trouble}\n         -> {self.advice}"


def examine_environment() -> Iterator[Finding]:
    """Packages, device, nnU-Net's variables, disk, and the trainers."""
    yield Finding("Python", f"{platform.python_version()}, nnssl_ext {__version__}")
    yield from _packages()
    yield _device()
    for name, purpose in VARIABLES.items():
        yield _folder_variable(name, purpose)
    yield _workers()
    yield from _trainers()


def _packages() -> Iterator[Finding]:
    try:
        found = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("nnunetv2", "", "is not installed", "pip install 'nnunetv2>=2.8.1,<3'")
        return
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not (2, 8, 1) <= numbers < (3,):
        yield Finding("nnunetv2", "", f"version {found} is not supported", "pip install 'nnunetv2>=2.8.1,<3'")
    else:
        yield Finding("nnunetv2", found)
    try:
        import torchvision  # nnU-Net needs it through timm

        yield Finding("torchvision", torchvision.__version__)
    except (ImportError, RuntimeError) as error:
        advice = "install both from the same index: pip install --force-reinstall torch torchvision"
        yield Finding("torchvision", "", f"cannot be imported beside this torch ({error})", advice)


def _device() -> Finding:
    import torch

    from nnssl_ext.training.wrapping import computes_in_bfloat16

    if torch.cuda.is_available():
        half = "bfloat16" if computes_in_bfloat16() else "float16"
        return Finding(
            "device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {half}"
        )
    return Finding("device", f"no CUDA device; use -device cpu (torch {torch.__version__})")


def _folder_variable(name: str, purpose: str) -> Finding:
    value = os.environ.get(name)
    if not value:
        return Finding(name, "", f"is not set ({purpose})", f"export {name}=/some/folder in your shell's profile")
    folder = Path(value)
    if not folder.is_dir():
        return Finding(name, "", f"names {folder}, which is no folder", f"mkdir -p {folder}, or correct the variable")
    free = shutil.disk_usage(folder).free / 2**30
    if free < LOW_DISK_GIB:
        return Finding(name, "", f"{folder} has only {free:.1f} GiB left", "free some space, or use another disk")
    return Finding(name, f"{folder}, {free:.0f} GiB free")


def _workers() -> Finding:
    value = os.environ.get("nnUNet_n_proc_DA")
    name = "nnUNet_n_proc_DA"
    if value is None:
        return Finding(name, "not set: up to four workers read for pretraining, nnU-Net uses twelve")
    if not value.isdigit():
        return Finding(name, "", f"is {value!r}, not a number of processes", f"export {name}=4, or unset it")
    if value == "0":
        return Finding(
            name,
            "",
            "is 0: nnU-Net's planning fails with it (pretraining and training run)",
            f"export {name}=1, or unset it while planning",
        )
    return Finding(name, value)


def _trainers() -> Iterator[Finding]:
    folder = resource_folder("trainers")
    advice = 'export nnUNet_extTrainer="$(nnssl_ext trainers --append)"'
    listed = named_trainer_folders()
    if not listed:
        yield Finding("nnUNet_extTrainer", "", "is not set: nnU-Net will not find our trainers", advice)
        return
    for path in listed:
        if not Path(path).is_dir():
            yield Finding("nnUNet_extTrainer", "", f"names {path}, which is no folder", f"correct it, or {advice}")
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for method in METHODS.values():
        try:
            found = recursive_find_trainer_class_by_name(TRAINERS[method.name])
        except Exception as error:  # another folder's module may fail in any way
            yield Finding(TRAINERS[method.name], "", f"is not found by nnU-Net ({error})", advice)
            continue
        if getattr(found, "method_class", None) is not method:
            yield Finding(
                TRAINERS[method.name],
                "",
                f"is another class of that name, in module {found.__module__}",
                "put our folder first in nnUNet_extTrainer, or rename the other class",
            )
        else:
            yield Finding(TRAINERS[method.name], f"found, through {folder}")


def examine_dataset(dataset: str) -> Iterator[Finding]:
    """Plans, legal crops, preprocessed cases and files of one data set."""
    from nnssl_ext.environment import dataset_folder

    try:
        folder = dataset_folder(dataset)
    except UserError as error:
        yield Finding(
            f"data set {dataset}",
            "",
            str(error).removeprefix("nnssl_ext: error: "),
            f"nnUNetv2_plan_and_preprocess -d {dataset}",
        )
        return
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if not (folder / name).is_file():
            yield Finding(
                folder.name, "", f"{name} is missing", "nnUNetv2_extract_fingerprint or nnUNetv2_plan_and_preprocess"
            )
            return
    plans = sorted(path for path in folder.glob("*.json") if "configurations" in _content(path))
    if not plans:
        yield Finding(folder.name, "", "has no plans", f"nnUNetv2_plan_experiment -d {dataset}")
    for path in plans:
        yield from _examine_plans(path, read_json(folder / "dataset.json"))


def _content(path: Path) -> dict:
    content = read_json(path, object)
    return content if isinstance(content, dict) else {}


def _examine_plans(path: Path, dataset_json: dict) -> Iterator[Finding]:
    from nnssl_ext.data.index import CaseIndex
    from nnssl_ext.environment import worker_count
    from nnssl_ext.training.checks import check_plans

    plans = read_json(path)
    for configuration, content in plans["configurations"].items():
        if len(content.get("patch_size", ())) != 3:
            continue
        subject = f"{path.parent.name}, {path.stem}, {configuration}"
        for method in METHODS.values():
            try:
                _, _, geometry, batch_size = check_plans(method, plans, configuration, dataset_json)
            except UserError as error:
                yield Finding(
                    f"{subject}, {method.title}",
                    "",
                    str(error).removeprefix("nnssl_ext: error: "),
                    "derive other plans with nnssl_ext plan",
                )
                continue
            strides = total_stride(content)
            yield Finding(
                f"{subject}, {method.title}",
                f"crop {geometry.crop_size}, batch {batch_size}; edges are multiples of {strides}",
            )
        cases = path.parent / content["data_identifier"]
        if not cases.is_dir():
            yield Finding(
                subject,
                "",
                f"is not preprocessed ({cases.name} is missing)",
                f"nnUNetv2_preprocess -d {path.parent.name} -c {configuration}",
            )
            continue
        problems = CaseIndex.build(cases, workers=worker_count(), show_progress=True).problems()
        for case, problem in problems.items():
            yield Finding(f"{subject}, case {case}", "", problem, "preprocess the case again or remove it")
        if not problems:
            yield Finding(subject, f"all cases of {cases.name} can be read")
