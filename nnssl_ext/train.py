"""``nnUNetv2_train`` with its very arguments, and one line where it would show a traceback.

Before nnU-Net's own entry point takes over, the variables, the data set, its plans and the trainer are looked at.
``torchrun ... -m nnssl_ext.train`` is the same on several GPUs or machines.
"""

from __future__ import annotations

import argparse
import difflib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nnssl_ext.environment import MAX_TIME, dataset_folder, launched, time_limit, trainer_folders
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json
from nnssl_ext.resources import resource_folder


def train(arguments: Sequence[str]) -> None:
    """Check, then run stock nnU-Net's ``nnUNetv2_train`` in this process.

    Args:
        arguments: The words after ``nnUNetv2_train``, and ``--max-time HOURS`` for our trainers.

    Raises:
        UserError: For a missing variable, an unplanned data set, an unknown configuration, fold or trainer.
    """
    arguments, hours = _take_max_time(arguments)
    if any(word in ("-h", "--help") for word in arguments):
        _stock(arguments)
    elif launched():
        # takes a while: nnU-Net and torch
        from nnssl_ext.training.distributed.launch import process_group

        with process_group(lambda: _check(arguments, hours)):
            _stock(arguments)
    else:
        _check(arguments, hours)
        _stock(arguments)


def _stock(arguments: Sequence[str]) -> None:
    from nnunetv2.run.run_training import run_training_entry
    from torch.multiprocessing import ProcessExitedException

    sys.argv = ["nnssl_ext train", *arguments]
    try:
        run_training_entry()
    except ProcessExitedException as error:  # of -num_gpus
        if error.exit_code == 1:
            raise SystemExit(1) from error  # it has said why
        raise UserError(f"{error}; go on with --c") from error


def _take_max_time(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other words, and the hours of ``--max-time``."""
    parser = _Parser(prog="nnssl_ext train", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-time")
    known, others = parser.parse_known_args(list(arguments))
    return others, known.max_time


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; nnUNetv2_train --help lists the arguments")


def stock_parser() -> argparse.ArgumentParser:
    """The arguments of ``nnUNetv2_train``; an error in them is a ``UserError``."""
    parser = _Parser(prog="nnssl_ext train", add_help=False)
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
    """The arguments, if they can work; ``--max-time`` goes where every process of the training finds it."""
    known = stock_parser().parse_args(arguments)
    _check_together(known)
    if hours is not None:
        os.environ[MAX_TIME] = hours
        time_limit(None)
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        if not os.environ.get(variable):
            raise UserError(
                f"{variable} is not set; export it as nnU-Net's documentation says, or ask nnssl_ext doctor"
            )
    folder = dataset_folder(known.dataset_name_or_id)
    plans_file = folder / f"{known.p}.json"
    if not plans_file.is_file():
        found = sorted(path.stem for path in folder.glob("*.json") if "lans" in path.stem)
        raise UserError(f"{folder.name} has no plans '{known.p}'; it has {', '.join(found) or 'none: plan it first'}")
    configurations = read_json(plans_file)["configurations"]
    if known.configuration not in configurations:
        raise UserError(
            f"plans {known.p} have no configuration '{known.configuration}'; they have {', '.join(configurations)}"
        )
    if known.fold != "all" and not known.fold.isdigit():
        raise UserError(f"fold must be 'all' or a number, got '{known.fold}'")
    if known.pretrained_weights and not Path(known.pretrained_weights).is_file():
        raise UserError(f"-pretrained_weights {known.pretrained_weights} does not exist")
    _add_our_trainers()
    _check_trainer(known.tr)
    return known


def _check_together(known: argparse.Namespace) -> None:
    for one, other in (("c", "val"), ("c", "pretrained_weights"), ("val_best", "disable_checkpointing")):
        if getattr(known, one) and getattr(known, other):
            dashes = "-" if other == "pretrained_weights" else "--"
            raise UserError(f"--{one} and {dashes}{other} exclude each other; give one of the two")


def _add_our_trainers() -> None:
    os.environ["nnUNet_extTrainer"] = trainer_folders()


def _check_trainer(name: str) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, _trainer_names(), n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else "nnssl_ext methods lists ours"
        raise UserError(f"trainer '{name}' was not found; {hint}") from error


def _trainer_names() -> list[str]:
    """Names of our trainers, and of nnU-Net's modules, which are called as their main class."""
    import nnunetv2.training.nnUNetTrainer

    names = [path.stem for path in resource_folder("trainers").glob("*.py")]
    names += [
        module.name.rpartition(".")[2] for module in pkgutil.walk_packages(nnunetv2.training.nnUNetTrainer.__path__)
    ]
    return names


if __name__ == "__main__":
    train(sys.argv[1:])
