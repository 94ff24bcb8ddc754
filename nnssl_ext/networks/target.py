"""The network that a trainer builds from a data set's plans."""

from __future__ import annotations

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl_ext.errors import UserError
from nnssl_ext.settings import PLANS_KEY


def target_network(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    input_channels: int,
    outputs: int,
    deep_supervision: bool = True,
    trainer: str | None = None,
) -> nn.Module:
    """The network that ``trainer`` builds, or the plans' target trainer if None.

    Raises:
        UserError: If nnU-Net does not find the trainer.
    """
    name = trainer or plans_manager.plans.get(PLANS_KEY, {}).get("target_trainer", "nnUNetTrainer")
    where = "-tr" if trainer else f"plans {plans_manager.plans_name}: target_trainer"
    try:
        target = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UserError(f"{where} '{name}' was not found by nnU-Net; is its folder in nnUNet_extTrainer?") from error
    return target.build_network_architecture(
        plans_manager, configuration_manager, input_channels, outputs, deep_supervision
    )
