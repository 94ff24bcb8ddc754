"""Find everything that cannot work before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl_ext.commands import RunName
from nnssl_ext.configurations import configuration_of, unusable
from nnssl_ext.data.cases import list_cases, shorten, stored_as
from nnssl_ext.data.images import SampleSource
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.environment import check_device, check_processes, check_shared_memory, check_split, worker_count
from nnssl_ext.errors import UserError
from nnssl_ext.files import check_writable
from nnssl_ext.methods import SCHEMAS, DataGeometry, Method
from nnssl_ext.networks.backbone import Backbone, backbone_of
from nnssl_ext.networks.base import triple
from nnssl_ext.networks.target import target_network
from nnssl_ext.recipe import read_json
from nnssl_ext.settings import PLANS_KEY, CommonSettings, split_sections
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.distributed.store import from_the_first

#: nnU-Net's numbered folds split into five parts.
FOLDS = 5


@dataclass(frozen=True)
class Checked:
    """Validated inputs of a run.

    Attributes:
        common: Settings that all methods share.
        settings: The method's settings.
        geometry: Crop, spacing and channels.
        batch_size: Samples a step over all processes.
        index: The cases.
        training_cases: How many of them this fold trains on.
        samples: Where samples are read from.
    """

    common: CommonSettings
    settings: Any
    geometry: DataGeometry
    batch_size: int
    index: CaseIndex
    training_cases: int
    samples: SampleSource


def check_run(
    method: type[Method],
    plans: dict,
    configuration: str,
    fold: int | str,
    dataset_json: dict,
    device: torch.device,
) -> Checked:
    """Check plans, settings, network, cases and folders.

    Raises:
        UserError: One line about the first thing that cannot work.
    """
    check_device(device.type, resamples=True)
    check_processes()
    common, settings, geometry, batch_size = check_plans(method, plans, configuration, dataset_json)
    if batch_size < world():
        raise UserError(
            f"batch size {batch_size} is smaller than the number of GPUs ({world()}). Use fewer GPUs, or plan a larger "
            f"batch_size"
        )

    manager = PlansManager(plans)
    base = Path(str(nnUNet_preprocessed)) / manager.dataset_name
    check_split(base, fold)
    crop_bytes = math.prod(geometry.crop_size) * geometry.channels * 4  # float32
    check_shared_memory(batch_size // world() * crop_bytes, worker_count())
    folder = base / manager.get_configuration(configuration).data_identifier
    index = _index(folder, geometry.channels, common.max_unreadable_fraction)
    geometry = replace(geometry, case_size=index.common_size())
    samples = method.samples(common, index)
    geometry = replace(geometry, classes=samples.classes)
    check_backbone(method, manager, configuration, geometry.channels)
    fewest = method.crops(settings, geometry).min_cases
    cases = _training_cases(base, index, fold)
    if cases < fewest:
        raise UserError(
            f"{method.title} with these settings needs at least {fewest} training cases, fold {fold} of "
            f"{manager.dataset_name} has {cases}"
        )
    if not nnUNet_results.get():
        raise UserError("nnUNet_results is not set. Export it as nnU-Net's documentation says")
    if rank() == 0:
        check_writable(Path(str(nnUNet_results)), "nnUNet_results")
    if world() > 1:
        dist.barrier()  # nothing is written before all have found everything right
    return Checked(common, settings, geometry, batch_size, index, cases, samples)


def check_finetuning_data(
    manager: PlansManager, configuration: str, fold: int | str, dataset_json: dict, trainer: str
) -> None:
    """Check cases, shared memory, and the predictions before a cascade stage.

    Raises:
        UserError: If they are not there, the cases are stored as nnU-Net cannot read them, or /dev/shm is too small.
    """
    config = manager.get_configuration(configuration)
    folder = Path(str(nnUNet_preprocessed)) / manager.dataset_name / config.data_identifier
    if folder.is_dir():
        stored_as(folder)
    channels = determine_num_input_channels(manager, config, dataset_json)
    voxels = math.prod(config.patch_size) * config.batch_size // world()
    check_shared_memory(voxels * (channels * 4 + 2), get_allowed_n_proc_DA())  # float32, and int16 for the labels
    if before := config.previous_stage_name:
        run = RunName(manager.dataset_name, before, "FOLD", manager.plans_name, trainer)
        results = Path(str(nnUNet_results), run.dataset, run.folder_name)
        predicted = results / "predicted_next_stage" / configuration
        found = {path.stem for path in predicted.glob("*")}
        if absent := [case for case in _cases_of_fold(folder, fold) if case not in found]:
            raise UserError(
                f"{predicted} lacks {len(absent)} cases ({shorten(absent)}), but '{configuration}' needs the "
                f"predictions of {before}. Train it first, all folds: {run.command()}"
            )


def _cases_of_fold(folder: Path, fold: int | str) -> list[str]:
    """Return a fold's training and validation cases.

    Where no split names them these are all preprocessed ones.
    """
    splits = _read_splits(file) if (file := folder.parent / "splits_final.json").is_file() else []
    if fold != "all" and int(fold) < len(splits):
        return sorted({*splits[int(fold)]["train"], *splits[int(fold)]["val"]})
    return sorted(list_cases(folder)) if folder.is_dir() else []


def check_plans(
    method: type[Method], plans: dict, configuration: str, dataset_json: dict
) -> tuple[CommonSettings, Any, DataGeometry, int]:
    """Check what depends on the plans alone.

    Return the common settings, the method's settings, the data geometry and the batch size.
    """
    where = f"plans {plans['plans_name']}"
    if reason := unusable(configuration, configuration_of(plans, configuration), "pretrain"):
        raise UserError(reason)
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    common, sections = split_sections(plans.get(PLANS_KEY, {}), SCHEMAS, where)
    settings = sections[method.name]
    channels = determine_num_input_channels(manager, config, dataset_json)
    with torch.device("meta"):
        backbone = target_backbone(manager, config, channels, 2)
    crop_size = triple(common.crop_size or config.patch_size)
    batch_size = common.batch_size or config.batch_size
    strides, spacing = tuple(backbone.strides), tuple(config.spacing)
    masked = tuple(map(bool, config.use_mask_for_norm))
    geometry = DataGeometry(crop_size, spacing, channels, strides, batch_size=batch_size, masked=masked)
    if common.crop_size is None and common.batch_size is None:
        crop_size, batch_size = method.sampling(settings, geometry)
        geometry = replace(geometry, crop_size=crop_size, batch_size=batch_size)
    problem = backbone.crop_problem(geometry.crop_size)
    if problem:
        raise UserError(f"{where}, configuration '{configuration}': {problem}")
    return common, settings, geometry, batch_size


def target_backbone(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    input_channels: int,
    outputs: int,
    checkpointing: bool = False,
) -> Backbone:
    """Build ``target_network`` as a backbone.

    Raises:
        UserError: For a network of unknown kind or wrong arguments.
    """
    try:
        backbone = backbone_of(target_network(plans_manager, configuration_manager, input_channels, outputs))
    except (ValueError, TypeError) as error:
        raise UserError(f"plans {plans_manager.plans_name}: {error}") from error
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone


def check_backbone(method: type[Method], manager: PlansManager, configuration: str, channels: int) -> None:
    """Refuse a network that lacks what the method needs."""
    with torch.device("meta"):
        backbone = target_backbone(manager, manager.get_configuration(configuration), channels, 2)
    try:
        method.check_backbone(backbone)
    except ValueError as error:
        raise UserError(f"{method.title} cannot pretrain the network of plans {manager.plans_name}: {error}") from error


def _index(folder: Path, channels: int, max_unreadable_fraction: float) -> CaseIndex:
    if not folder.is_dir():
        raise UserError(f"no preprocessed data in {folder}. Run nnUNetv2_preprocess or nnUNetv2_plan_and_preprocess")
    # the first process looks at new cases; the others may not see yet what it wrote to a network file system
    index = from_the_first("index", lambda: CaseIndex.build(folder, workers=worker_count(), show_progress=True))
    if not index.cases:
        raise UserError(f"no case in {folder}. Run nnUNetv2_preprocess for this configuration")
    stored_as(folder)
    problems = index.problems(channels)
    if len(problems) > max_unreadable_fraction * len(index.cases):
        listed = shorten(f"case '{case}' {problem}" for case, problem in sorted(problems.items()))
        raise UserError(
            f"{folder}: {listed}. Preprocess these cases again or remove them (nnssl_ext.max_unreadable_fraction="
            f"{max_unreadable_fraction} is the share of cases that a run does without)"
        )
    index.left_out = problems
    return index


def _training_cases(base: Path, index: CaseIndex, fold: int | str) -> int:
    """Count the readable training cases of a fold, as nnU-Net splits them."""
    cases, left_out = index.cases, index.left_out
    if fold == "all":
        return len(cases) - len(left_out)
    splits = base / "splits_final.json"
    if splits.is_file():
        content = _read_splits(splits)
        if int(fold) < len(content):
            part = content[int(fold)]
            _known(part["val"], cases, splits)
            return len(set(_known(part["train"], cases, splits)) - set(left_out))
    elif len(cases) < FOLDS:
        raise UserError(f"fold {fold} needs at least {FOLDS} cases, {base.name} has {len(cases)}. Use fold 'all'")
    return int((len(cases) - len(left_out)) * 0.8)


def _read_splits(path: Path) -> list[dict]:
    content = read_json(path, list)
    if not all(isinstance(part, dict) and {"train", "val"} <= set(part) for part in content):
        raise UserError(f"{path} must be a list of objects with 'train' and 'val'")
    return content


def _known(wanted: list[str], cases: list[str], splits: Path) -> list[str]:
    missing = sorted(set(wanted) - set(cases))
    if missing:
        raise UserError(f"{splits} names cases that are not preprocessed: {shorten(missing)}")
    return wanted
