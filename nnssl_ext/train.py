"""Run ``nnUNetv2_train`` after checks of its input.

Variables, data set, plans, trainer, device and weights are checked before nnU-Net's entry point takes over.
``torchrun ... -m nnssl_ext.train`` does the same on several GPUs or machines.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nnssl_ext import environment
from nnssl_ext.commands import TRAIN, RunName, same_number
from nnssl_ext.configurations import configuration_of
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import find_trainer, trainer_folders
from nnssl_ext.files import check_writable
from nnssl_ext.recipe import read_json

#: Bytes of a voxel in a batch: float32 for each channel, int16 for the labels.
CHANNEL_BYTES, LABEL_BYTES = 4, 2


def train(arguments: Sequence[str]) -> None:
    """Check, then run stock nnU-Net's ``nnUNetv2_train`` in this process.

    Args:
        arguments: Words after ``nnUNetv2_train``, and ``--max-time HOURS`` for our trainers.

    Raises:
        UserError: For anything that would stop nnU-Net with a traceback.
    """
    arguments, hours = _take_max_time(arguments)
    if any(word in ("-h", "--help") for word in arguments):
        _stock(arguments)
    elif environment.launched():
        from nnssl_ext.training.distributed.launch import process_group  # imports nnU-Net and torch

        with process_group(lambda: _check(arguments, hours)):
            _stock(arguments)
    else:
        _check(arguments, hours)
        _stock(arguments)


def _stock(arguments: Sequence[str]) -> None:
    from nnunetv2.run.run_training import run_training_entry
    from torch.multiprocessing import ProcessExitedException

    sys.argv = [TRAIN, *arguments]
    try:
        run_training_entry()
    except ProcessExitedException as error:  # of -num_gpus
        if error.exit_code == 1:
            raise SystemExit(1) from error  # it has printed its reason
        raise UserError(f"{error}. Go on with --c") from error


def _take_max_time(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Split off the hours of ``--max-time``."""
    parser = _Parser(prog=TRAIN, add_help=False, allow_abbrev=False)
    parser.add_argument("--max-time")
    known, others = parser.parse_known_args(list(arguments))
    return others, known.max_time


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. nnUNetv2_train --help lists the arguments")


def stock_parser() -> argparse.ArgumentParser:
    """Return a parser of ``nnUNetv2_train``'s arguments."""
    parser = _Parser(prog=TRAIN, add_help=False)
    for name in ("dataset_name_or_id", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-pretrained_weights")
    parser.add_argument("-num_gpus", type=int)
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    for name in ("npz", "c", "val", "val_best", "disable_checkpointing"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def _check(arguments: Sequence[str], hours: str | None) -> argparse.Namespace:
    """Return the parsed arguments if they can work."""
    known = stock_parser().parse_args(arguments)
    _check_together(known)
    environment.check_processes()
    results = environment.named_folder("nnUNet_results")
    folder = environment.dataset_folder(known.dataset_name_or_id)
    others = [] if known.dataset_name_or_id.startswith("Dataset") else same_number(folder.name)
    if others:
        found = f"nnU-Net finds {', '.join(others)} for number {known.dataset_name_or_id}, too"
        raise UserError(f"{found}. Give the name {folder.name}")
    plans, dataset_json = _plans(folder, known.p), read_json(folder / "dataset.json")
    configuration = configuration_of(plans, known.configuration)
    for file in (folder / f"{known.p}.json", folder / "dataset.json"):
        _check_stock_reads(file)
    if known.fold != "all" and not known.fold.isdigit():
        raise UserError(f"fold must be 'all' or a number, got '{known.fold}'")
    weights = Path(known.pretrained_weights) if known.pretrained_weights else None
    if weights is not None and not weights.is_file():
        raise UserError(f"-pretrained_weights {weights} does not exist")
    os.environ["nnUNet_extTrainer"] = trainer_folders()
    trainer = find_trainer(known.tr)
    if hours is not None:
        if not hasattr(trainer, "time_limited"):
            raise UserError(
                f"--max-time: {known.tr} does not stop by itself. Use -tr nnsslTrainer_Finetune, or leave it out"
            )
        os.environ[environment.MAX_TIME] = hours
        environment.time_limit(None)
    _check_devices(known, configuration.get("batch_size") if not hasattr(trainer, "method_class") else None)
    environment.check_split(folder, known.fold)
    check_writable(results, "nnUNet_results")
    run = RunName(folder.name, known.configuration, known.fold, known.p, known.tr)
    _check_checkpoints(known, results / run.dataset / run.folder_name)
    _check_batches(trainer, configuration, dataset_json)
    if weights is not None:
        if run.replaces() and not known.val:
            raise UserError(
                f"{run.trained()[0]} holds a finished training, which this would replace. To keep it, set "
                f"nnUNet_results to another folder; else remove it"
            )
        from nnssl_ext.networks.target import check_stock_weights
        from nnssl_ext.training.checks import check_plans

        outputs = None
        if hasattr(trainer, "method_class"):
            _, settings, geometry, _ = check_plans(trainer.method_class, plans, known.configuration, dataset_json)
            outputs = trainer.method_class.output_channels(settings, geometry)
        seen = check_stock_weights(weights, trainer, plans, known.configuration, dataset_json, outputs)
        if seen.get("dataset") == folder.name and str(seen.get("fold")) != known.fold != "all":
            print(
                f"note: {weights} was pretrained on fold {seen['fold']}. It has seen validation images of fold "
                f"{known.fold}, so their Dice will be too good"
            )
    return known


def _check_together(known: argparse.Namespace) -> None:
    for one, other in (("c", "val"), ("c", "pretrained_weights"), ("val_best", "disable_checkpointing")):
        if getattr(known, one) and getattr(known, other):
            dashes = "-" if other == "pretrained_weights" else "--"
            raise UserError(f"--{one} and {dashes}{other} exclude each other. Give one of the two")


def _plans(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    if not file.is_file():
        found = sorted(path.stem for path in folder.glob("*.json") if "lans" in path.stem)
        raise UserError(f"{folder.name} has no plans '{name}'. It has {', '.join(found) or 'none: plan it first'}")
    plans = read_json(file)
    if plans.get("dataset_name") != folder.name:
        raise UserError(
            f"{file} is for {plans.get('dataset_name')}, whose data nnU-Net would take. Copy plans with "
            f"nnUNetv2_move_plans_between_datasets, or correct its dataset_name"
        )
    if plans.get("plans_name") != name:
        raise UserError(
            f"{file} has the plans_name '{plans.get('plans_name')}', by which nnU-Net names the results folder. Set it "
            f"to '{name}'"
        )
    return plans


def _check_stock_reads(file: Path) -> None:
    """Refuse JSON that we can read, but nnU-Net cannot."""
    if file.read_bytes().startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{file} begins with a byte-order mark, which nnU-Net cannot read. Save it without one")
    try:
        file.read_text()  # in the locale's encoding, as nnU-Net does
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is UTF-8, which nnU-Net does not read in this locale. Export PYTHONUTF8=1") from error


def _check_devices(known: argparse.Namespace, batch_size: int | None = None) -> None:
    """Check the device, and that each process has a sample. A pretraining checks its own ``batch_size``."""
    number = 1 if known.num_gpus is None else known.num_gpus
    world = max(number, int(os.environ.get("WORLD_SIZE", 1)) if environment.launched() else 1)
    if batch_size is not None and world > batch_size:
        raise UserError(f"{world} GPUs share a batch of {batch_size}, and each needs a sample. Use fewer GPUs")
    if number < 1:
        raise UserError(f"-num_gpus must be at least 1, got {number}")
    if number > 1 and known.device != "cuda":
        raise UserError(
            f"-num_gpus {number} needs -device cuda, got {known.device}. Leave -num_gpus out, or start several "
            f"processes of a pretraining on the CPU with torchrun -m nnssl_ext.train"
        )
    environment.check_device(known.device)
    if known.device == "cuda":
        import torch

        if number > torch.cuda.device_count():
            raise UserError(f"-num_gpus {number} is more than the {torch.cuda.device_count()} GPUs that torch finds")
    if number > 1:
        from nnssl_ext.training.distributed.ranks import check_nccl

        check_nccl()


def _check_checkpoints(known: argparse.Namespace, runs: Path) -> None:
    wanted = {"final": known.val, "best": known.val_best and known.val}
    for name, needed in wanted.items():
        file = runs / f"fold_{known.fold}" / f"checkpoint_{name}.pth"
        if needed and not file.is_file():
            raise UserError(f"--val needs {file}, which does not exist. Finish the training first")


def _check_batches(trainer_class: Any, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> None:
    """Refuse a shared memory too small for the batches."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    if hasattr(trainer_class, "method_class"):  # a pretraining checks its own crops
        return
    channels = len(dataset_json.get("channel_names") or dataset_json.get("modality") or [0])
    voxels = configuration["batch_size"] * math.prod(configuration["patch_size"])
    environment.check_shared_memory(voxels * (channels * CHANNEL_BYTES + LABEL_BYTES), get_allowed_n_proc_DA())


if __name__ == "__main__":
    train(sys.argv[1:])
