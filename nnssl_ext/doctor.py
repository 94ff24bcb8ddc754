"""Find problems of an installation or a data set.

Without a data set, nothing here imports torch or nnU-Net: importlib, nvidia-smi and the files say enough, in a fraction
of the time.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from nnssl_ext import __version__
from nnssl_ext.commands import dataset_number
from nnssl_ext.configurations import configuration_of, total_stride, unusable
from nnssl_ext.data.corpus import TARGET_KEY
from nnssl_ext.environment import PROCESSES, SHARED_MEMORY, cores, dataset_folder, process_problem
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import failing_modules, holder_of, is_ours, named_trainer_folders, our_trainers
from nnssl_ext.files import replaced_on_success
from nnssl_ext.recipe import read_json
from nnssl_ext.resources import resource_folder

#: Below this much free space, a checkpoint or a preprocessed data set may not fit.
LOW_DISK_GIB = 5.0
#: Below this much shared memory, batches of usual patches do not fit. Docker's default is 0.06.
LOW_SHARED_MEMORY_GIB = 1.0
VARIABLES = {
    "nnUNet_raw": "raw data sets, for planning and preprocessing",
    "nnUNet_preprocessed": "preprocessed data sets, for training",
    "nnUNet_results": "checkpoints and logs",
}
#: Versions that reports name.
PACKAGES = ("torch", "torchvision", "dynamic-network-architectures", "batchgenerators", "blosc2", "numpy", "timm")
#: Between a data set's plans and a case in a finding's subject.
CASE = ", case "
#: Absolute paths, and names of data sets, in reports.
PATHS = re.compile(r"(?<=['\"])(?:[A-Za-z]:)?[/\\][^'\":]+(?=['\"])|(?<![\w<>])(?:[A-Za-z]:)?[/\\](?:[^\s:;,'\"()]+)")
DATASETS = re.compile(r"(Dataset\d+)_[^\s,:;'\"()/]+")
APPEND = 'export nnUNet_extTrainer="$(nnssl_ext trainers --append)"'


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: What was checked.
        state: What was found, if it is well.
        trouble: The problem; '' if there is none.
        advice: What to do about it.
    """

    subject: str
    state: str
    trouble: str = ""
    advice: str = ""

    def __str__(self) -> str:
        if not self.trouble:
            return f"  ok  {self.subject}: {self.state}"
        return f"TROUBLE  {self.subject}: {self.trouble}\n         -> {self.advice}"


def examine(dataset: str | None) -> Iterator[Finding]:
    """Check the environment and, if named, a data set."""
    yield from examine_environment()
    if dataset is not None:
        for name in PROCESSES:  # nnU-Net's import would fail at what has been found by now
            if process_problem(name):
                del os.environ[name]
        yield from kept_going(f"data set {dataset}", examine_dataset(dataset))


def write_report(findings: Sequence[Finding], file: str) -> None:
    """Write findings to a file without paths and names.

    Raises:
        UserError: If the file cannot be written.
    """
    text = "\n".join(str(finding) for finding in findings).replace("\\\\", "\\") + "\n"  # Windows' paths in errors
    cases = {finding.subject.partition(CASE)[2] for finding in findings} - {""}
    for case in sorted(cases, key=len, reverse=True):
        # in a subject, in quotes or in a path: a case may be called 3
        text = re.sub(rf"({CASE}|['\"/\\]){re.escape(case)}(?=[:'\"._/\\])", r"\1<case>", text)
    names = [*VARIABLES, "HOME", "USERPROFILE"]
    values = [(os.environ.get(name, ""), name) for name in names]
    values += [(folder, "nnUNet_extTrainer") for folder in named_trainer_folders()]
    for value, name in sorted(values, key=lambda pair: -len(pair[0])):
        if value.strip("./\\"):  # not "."
            text = text.replace(value.rstrip("/\\"), f"<{name}>")
    text = PATHS.sub("<path>", DATASETS.sub(r"\1_<name>", text))
    try:
        with replaced_on_success(Path(file)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def examine_environment() -> Iterator[Finding]:
    """Check packages, device, variables, disk and trainers."""
    yield Finding(
        "Python", f"{platform.python_version()}, nnssl_ext {__version__}, {platform.system()}, {cores()} cores"
    )
    for check in (_packages, _device, _folders, _processes, _shared_memory, _trainers):
        yield from kept_going(check.__name__.strip("_").replace("_", " "), check())


def kept_going(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings. A failed check is one more."""
    try:
        yield from findings
    except (Exception, UserError) as error:
        reason = getattr(error, "line", f"{type(error).__name__}: {error}")
        yield Finding(subject, "", reason, "correct it, then run nnssl_ext doctor again")


def _packages() -> Iterator[Finding]:
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        yield Finding("nnunetv2", "", "is not installed", "pip install 'nnunetv2>=2.8.1,<3'")
        return
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not (2, 8, 1) <= numbers < (3,):
        yield Finding("nnunetv2", "", f"version {found} is not supported", "pip install 'nnunetv2>=2.8.1,<3'")
    else:
        yield Finding("nnunetv2", found)
    versions = {name: _version(name) for name in PACKAGES}
    yield Finding("packages", ", ".join(f"{name} {number}" for name, number in versions.items()))
    yield from _torchvision(versions["torch"], versions["torchvision"])


def _torchvision(torch: str, torchvision: str) -> Iterator[Finding]:
    """Compare torch with what torchvision was built for."""
    advice = "install both from the same index: pip install --force-reinstall torch torchvision"
    if "missing" in (torch, torchvision):
        yield Finding("torchvision", "", f"torch is {torch}, torchvision {torchvision}", advice)
        return
    matches = (re.match(r"torch *\(?== *([^);]+)", line) for line in requires("torchvision") or ())
    wanted = [match[1] for match in matches if match]
    builds = [number.partition("+")[2] for number in (torch, torchvision)]
    if wanted and wanted[0].partition("+")[0] != torch.partition("+")[0]:
        yield Finding("torchvision", "", f"{torchvision} is made for torch {wanted[0]}, not {torch}", advice)
    elif all(builds) and builds[0] != builds[1]:
        yield Finding("torchvision", "", f"{torchvision} is another build than torch {torch}", advice)
    else:
        yield Finding("torchvision", torchvision)


def _version(package: str) -> str:
    """Return a package's version, for torch with its build."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return "missing"
    spec = importlib.util.find_spec(package) if package.startswith("torch") else None
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path()
    build = re.search(r"__version__ = '([^']+)'", file.read_text(encoding="utf-8")) if file.is_file() else None
    return build[1] if build else found


def _device() -> Iterator[Finding]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        yield Finding("device", "no NVIDIA GPU (nvidia-smi is not there); without another GPU, use -device cpu")
        return
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        yield Finding("device", "nvidia-smi finds no GPU; use -device cpu")
        return
    torch = _version("torch")
    if torch.endswith("+cpu"):
        advice = "install a build for CUDA, see https://pytorch.org/get-started/locally"
        yield Finding("device", "", f"{names[0]} is there, but torch {torch} is built without CUDA", advice)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        note = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
        yield Finding("device", f"{len(names)} x {names[0]}{note}")


def _folders() -> Iterator[Finding]:
    for name, purpose in VARIABLES.items():
        yield _folder_variable(name, purpose)


def _folder_variable(name: str, purpose: str) -> Finding:
    value = os.environ.get(name, "")
    if not value.strip():
        return Finding(name, "", f"is not set ({purpose})", f"export {name}=/some/folder in your shell's profile")
    folder = Path(value)
    if not folder.is_dir():
        return Finding(name, "", f"names {folder}, which is no folder", f"mkdir -p {folder}, or correct the variable")
    if name == "nnUNet_results" and not os.access(folder, os.W_OK):
        return Finding(name, "", f"{folder} cannot be written", "give write permission, or name another folder")
    free = shutil.disk_usage(folder).free / 2**30
    if free < LOW_DISK_GIB and os.access(folder, os.W_OK):
        return Finding(name, "", f"{folder} has only {free:.1f} GiB left", "free some space, or use another disk")
    return Finding(name, f"{folder}, {free:.0f} GiB free" + ("" if os.access(folder, os.W_OK) else ", read-only"))


def _processes() -> Iterator[Finding]:
    defaults = ("not set: up to four workers read for pretraining, nnU-Net uses twelve", "not set: nnU-Net uses eight")
    for name, default in zip(PROCESSES, defaults, strict=True):
        value = os.environ.get(name)
        if problem := process_problem(name):
            yield Finding(name, "", problem, f"export {name}=4, or unset it")
        elif value is not None and int(value) == 0:
            trouble = "is 0: nnU-Net's planning fails with it (pretraining and training run)"
            yield Finding(name, "", trouble, f"export {name}=1, or unset it while planning")
        else:
            yield Finding(name, value or default)


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    if free < LOW_SHARED_MEMORY_GIB:
        advice = "start the container with --shm-size=8g or --ipc=host, or pretrain with nnUNet_n_proc_DA=0"
        yield Finding(str(SHARED_MEMORY), "", f"has only {free:.2f} GiB for batches between processes", advice)
    else:
        yield Finding(str(SHARED_MEMORY), f"{free:.0f} GiB free")


def _trainers() -> Iterator[Finding]:
    listed = named_trainer_folders()
    if not listed:
        yield Finding("nnUNet_extTrainer", "", "is not set: nnU-Net will not find our trainers", APPEND)
        return
    for path in listed:
        if not Path(path).is_dir():
            yield Finding("nnUNet_extTrainer", "", f"names {path}, which is no folder", f"correct it, or {APPEND}")
        elif not is_ours(path):
            for file, reason in failing_modules(Path(path)):
                trouble = f"cannot be imported ({reason}): nnU-Net stops there when it looks for a trainer"
                yield Finding(str(file), "", trouble, "repair it, or take its folder out of nnUNet_extTrainer")
    if not any(map(is_ours, listed)):
        yield Finding("nnUNet_extTrainer", "", "does not name our trainers", APPEND)
    for trainer in our_trainers():
        holder = holder_of(trainer)
        if holder is not None and not is_ours(holder.parent):
            advice = "put our folder first in nnUNet_extTrainer, or rename the other class"
            yield Finding(trainer, "", f"is another class of that name, in {holder}", advice)
        elif holder is not None:
            yield Finding(trainer, f"found, through {resource_folder('trainers')}")


def examine_dataset(dataset: str) -> Iterator[Finding]:
    """Check plans, crops, cases and files of a data set."""
    yield from kept_going("torch", _torch_device())
    try:
        folder = dataset_folder(dataset)
    except UserError as error:
        yield Finding(f"data set {dataset}", "", error.line, f"nnUNetv2_plan_and_preprocess -d {_number(dataset)}")
        return
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if not (folder / name).is_file():
            advice = "nnUNetv2_extract_fingerprint or nnUNetv2_plan_and_preprocess"
            yield Finding(folder.name, "", f"{name} is missing", advice)
            return
    yield from kept_going(folder.name, _encoding(folder))
    files = [path for path in sorted(folder.glob("*.json")) if "lans" in path.stem or _has_configurations(path)]
    if not files:
        yield Finding(folder.name, "", "has no plans", f"nnUNetv2_plan_experiment -d {_number(dataset)}")
    for path in files:
        yield from kept_going(f"{folder.name}, {path.stem}", _plans(path))
    if os.environ.get("nnUNet_raw"):
        yield from kept_going(folder.name, _raw_images(folder.name))


def _torch_device() -> Iterator[Finding]:
    import torch

    from nnssl_ext.training.wrapping import computes_in_bfloat16

    if torch.cuda.is_available():
        half = "bfloat16" if computes_in_bfloat16() else "float16"
        yield Finding("torch", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {half}")
    else:
        yield Finding("torch", "finds no CUDA device; use -device cpu")


def _raw_images(name: str) -> Iterator[Finding]:
    """Look for images and labels that are cut short."""
    from nnssl_ext.foreign import nifti_problem

    folders = [Path(os.environ["nnUNet_raw"]) / name / part for part in ("imagesTr", "labelsTr")]
    folders.append(Path(os.environ["nnUNet_preprocessed"]) / name / "gt_segmentations")
    paths = [path for folder in folders for path in sorted(folder.glob("*.nii*"))]
    whole = True
    for path in paths:
        if problem := nifti_problem(path, quick=True):
            whole = False
            advice = "nnU-Net reads what is missing as zeros: copy the file again, delete gt_segmentations, preprocess"
            yield Finding(f"{name}{CASE}{path.name}", "", problem, advice)
    if paths and whole:
        yield Finding(name, f"{len(paths)} raw files are not cut short")


def _encoding(folder: Path) -> Iterator[Finding]:
    for path in sorted(folder.glob("*.json")):
        if path.read_bytes()[:3] == b"\xef\xbb\xbf":
            trouble = "begins with a byte-order mark, which nnU-Net cannot read"
            yield Finding(f"{folder.name}, {path.name}", "", trouble, "save it as UTF-8 without one")


def _has_configurations(path: Path) -> bool:
    try:
        return "configurations" in read_json(path, dict)
    except UserError:  # a list, or damaged: named where it is read
        return False


def _number(dataset: str) -> str:
    """Return a data set's number, which is all that nnU-Net's commands take."""
    try:
        return str(dataset_number(dataset))
    except ValueError:
        return dataset


def _plans(path: Path) -> Iterator[Finding]:
    plans, dataset_json = read_json(path), read_json(path.parent / "dataset.json")
    if plans.get("dataset_name") != path.parent.name:
        trouble = f"are for {plans.get('dataset_name')}, whose data nnU-Net would take"
        advice = "copy plans with nnUNetv2_move_plans_between_datasets, or correct dataset_name"
        yield Finding(f"{path.parent.name}, {path.stem}", "", trouble, advice)
    if plans.get("plans_name") != path.stem:
        trouble = f"have the plans_name '{plans.get('plans_name')}', by which nnU-Net names the results folder"
        yield Finding(f"{path.parent.name}, {path.stem}", "", trouble, f"set it to '{path.stem}'")
    for name in plans.get("configurations", {}):
        subject = f"{path.parent.name}, {path.stem}, {name}"
        yield from kept_going(subject, _configuration(subject, path, plans, name, dataset_json))


def _data_folders(plans: dict) -> Iterator[str]:
    """Name the folders of the 3-D configurations' cases."""
    for name in plans["configurations"]:
        content = configuration_of(plans, name)
        if not unusable(name, content, ""):
            yield content["data_identifier"]


def _configuration(subject: str, path: Path, plans: dict, name: str, dataset_json: dict) -> Iterator[Finding]:
    from nnssl_ext.data.index import CaseIndex
    from nnssl_ext.environment import worker_count
    from nnssl_ext.methods import METHODS
    from nnssl_ext.training.checks import check_plans

    content: dict[str, Any] = configuration_of(plans, name)
    if unusable(name, content, ""):
        return
    channels = None
    for method in METHODS.values():
        try:
            _, _, geometry, batch_size = check_plans(method, plans, name, dataset_json)
        except UserError as error:
            advice = "derive other plans with nnssl_ext plan"
            yield Finding(f"{subject}, {method.title}", "", error.line, advice)
            continue
        channels = geometry.channels
        edges = f"edges are multiples of {total_stride(content)}"
        yield Finding(f"{subject}, {method.title}", f"crop {geometry.crop_size}, batch {batch_size}; {edges}")
    cases = path.parent / content["data_identifier"]
    advice = f"nnUNetv2_preprocess -d {_number(path.parent.name)} -plans_name {path.stem} -c {name}"
    if TARGET_KEY in dataset_json:
        advice = "call the nnssl_ext corpus command again"
    if not cases.is_dir():
        if any((path.parent / found).is_dir() for found in _data_folders(plans)):
            yield Finding(subject, f"is not preprocessed ({cases.name} is missing), others are")
            return
        yield Finding(subject, "", f"is not preprocessed ({cases.name} is missing)", advice)
        return
    workers = 1 if process_problem("nnUNet_n_proc_DA") else worker_count()
    index = CaseIndex.build(cases, workers=workers, show_progress=True)
    if not index.cases:
        yield Finding(subject, "", f"has no case in {cases.name}", advice)
        return
    problems = index.problems(channels)
    for case, problem in problems.items():
        yield Finding(f"{subject}{CASE}{case}", "", problem, "preprocess the case again or remove it")
    if not problems:
        yield Finding(subject, f"all cases of {cases.name} can be read")
