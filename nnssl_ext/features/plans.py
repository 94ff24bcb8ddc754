"""Choose the plans by which images are preprocessed and the encoder is built."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import our_trainers
from nnssl_ext.recipe import read_json
from nnssl_ext.settings import PLANS_KEY
from nnssl_ext.transfer.source import PretrainedWeights
from nnssl_ext.transfer.target import TargetPlans, checked_plans

#: Packages from which the plans inside a checkpoint may name classes. Others could run foreign code.
TRUSTED = ("dynamic_network_architectures.", "nnssl_ext.networks.", "torch.nn.")


def dataset_plans(
    source: PretrainedWeights, dataset: str, plans: str | None, configuration: str | None, trainer: str | None
) -> tuple[Path, TargetPlans]:
    """Read the plans of a data set.

    Args:
        source: The weights. Their plans' name, configuration and trainer are the defaults where the data set has them.
        dataset: Name or number of the data set.
        plans: Name of the plans.
        trainer: Name of the trainer that builds the network.

    Returns:
        The preprocessed folder, and the plans.

    Raises:
        UserError: If the data set or its plans are missing.
    """
    folder, recorded = dataset_folder(dataset), source.recorded
    name = plans or str(_mapping(recorded.get("plans")).get("plans_name", ""))
    if plans is None and not (folder / f"{name}.json").is_file():
        name = "nnUNetPlans"
    content = read_json(folder / f"{name}.json")
    return folder, _target(content, read_json(folder / "dataset.json"), recorded, configuration, trainer)


def recorded_plans(
    source: PretrainedWeights, plans: Path | None, configuration: str | None, trainer: str | None
) -> TargetPlans:
    """Read plans from a file with dataset.json beside it, else those that the checkpoint records.

    Args:
        source: The weights.
        plans: A file of plans, such as plans.json of nnU-Net's results folders.
        trainer: Name of the trainer that builds the network.

    Raises:
        UserError: If there are none, or the checkpoint's plans name classes of unknown packages.
    """
    if plans is not None:
        return _target(
            read_json(plans), read_json(plans.parent / "dataset.json"), source.recorded, configuration, trainer
        )
    content, dataset_json = (_mapping(source.recorded.get(key)) for key in ("plans", "dataset_json"))
    if not content or not dataset_json:
        raise UserError(
            f"Expected plans in {source.path.name}, got none ({source.kind}). Give a plans file with dataset.json "
            f"beside it by -p, or a data set by -d"
        )
    for name in _classes(content):
        if not _is_trusted(name):
            raise UserError(
                f"Expected classes of {', '.join(t[:-1] for t in TRUSTED)} in the plans of {source.path.name}, got "
                f"'{name}'. Read these plans, and give them as a file by -p if you trust them"
            )
    return _target(content, dataset_json, source.recorded, configuration, trainer)


def _target(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    recorded: Mapping[str, Any],
    configuration: str | None,
    trainer: str | None,
) -> TargetPlans:
    default = recorded.get("configuration")
    known = _mapping(plans.get("configurations"))
    configuration = configuration or (default if isinstance(default, str) and default in known else "3d_fullres")
    same = _mapping(recorded.get("plans")).get("plans_name") == plans.get("plans_name")
    builder = recorded.get("trainer_name") if same else None
    if not isinstance(builder, str) or builder in our_trainers():  # ours build what target_trainer names
        builder = "nnUNetTrainer"
    trainer = trainer or _mapping(plans.get(PLANS_KEY)).get("target_trainer") or builder
    return checked_plans(dict(plans), dict(dataset_json), configuration, trainer)


def _classes(plans: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted paths that nnU-Net would import to build the networks of plans."""
    for configuration in _mapping(plans.get("configurations")).values():
        architecture = _mapping(_mapping(configuration).get("architecture"))
        kwargs = _mapping(architecture.get("arch_kwargs"))
        names = [kwargs.get(key) for key in architecture.get("_kw_requires_import") or ()]
        yield from (str(name) for name in [architecture.get("network_class_name"), *names] if name is not None)


def _is_trusted(name: str) -> bool:
    """Tell whether a dotted path leads to a layer or network of a trusted package."""
    # the path may lead through a trusted module to something else, such as torch.nn.functional.torch.hub.load
    found = pydoc.locate(name) if name.startswith(TRUSTED) else None
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(TRUSTED)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
