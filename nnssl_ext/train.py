"""``nnUNetv2_train`` with its very arguments, and one line where it would show a traceback.

Before nnU-Net's own entry point takes over, the variables, the data set, its plans and the trainer are looked at.
"""

from __future__ import annotations

import argparse
import difflib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.environment import MAX_TIME, dataset_folder, time_limit
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
    arguments = _take_max_time(arguments)
    if not any(word in ("-h", "--help") for word in arguments):
        _check(arguments)
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["nnssl_ext train", *arguments]
    run_training_entry()


def _take_max_time(arguments: Sequence[str]) -> list[str]:
    """Put ``--max-time`` where every process of the training finds it; the other words."""
    parser = argparse.ArgumentParser(prog="nnssl_ext train", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-time")
    known, others = parser.parse_known_args(list(arguments))
    if known.max_time is not None:
        os.environ[MAX_TIME] = known.max_time
        time_limit(None)
    return others


def _check(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="nnssl_ext train", add_help=False)
    for name in ("dataset_name_or_id", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-pretrained_weights")
    known, _ = parser.parse_known_args(arguments)

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


def _add_our_trainers() -> None:
    ours = str(resource_folder("trainers"))
    folders = [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    if ours not in folders:
        os.environ["nnUNet_extTrainer"] = os.pathsep.join([*folders, ours])


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
