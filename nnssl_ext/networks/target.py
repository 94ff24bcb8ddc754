"""Build a trainer's network from a data set's plans."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnssl_ext.commands import RunName, dataset_word
from nnssl_ext.errors import NetworkError, UserError
from nnssl_ext.external_trainers import find_trainer, our_trainers
from nnssl_ext.foreign import load_tensors
from nnssl_ext.networks.base import HEADS
from nnssl_ext.settings import PLANS_KEY


def target_network(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    trainer: str | None = None,
) -> nn.Module:
    """Build the network of a trainer.

    Stock passes arguments by these names.

    Args:
        plans_manager: The plans.
        configuration_manager: The configuration.
        num_input_channels: Channels of the input.
        num_output_channels: Channels of the output.
        enable_deep_supervision: Whether the network returns its coarser outputs too.
        trainer: Name of the trainer; None takes the plans' target trainer.

    Raises:
        UserError: If nnU-Net does not find the trainer, or the target trainer is one of ours.
        NetworkError: If the trainer cannot build the network.
    """
    name = trainer or plans_manager.plans.get(PLANS_KEY, {}).get("target_trainer", "nnUNetTrainer")
    where = "-tr" if trainer else f"plans {plans_manager.plans_name}: target_trainer"
    if not trainer and name in our_trainers():  # ours build the target trainer's network
        raise UserError(f"{where}: expected a trainer with a network of its own, got '{name}'. Name nnU-Net's trainer")
    try:
        target: Any = find_trainer(name)
    except UserError as error:
        raise UserError(f"{where}: {error.line}") from error
    try:
        return _build(
            target,
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
    except Exception as error:  # a user's own trainer may fail in any way
        raise NetworkError(
            f"{name} cannot build the network of plans {plans_manager.plans_name} ({type(error).__name__}: {error}). "
            f"Check architecture.arch_kwargs, and whether the network takes patch {configuration_manager.patch_size}"
        ) from error


def _build(
    trainer_class: Any,
    plans: PlansManager,
    configuration: ConfigurationManager,
    channels: int,
    outputs: int,
    deep: bool,
) -> nn.Module:
    """Call a trainer's ``build_network_architecture`` as stock does: by its new or its old signature."""
    build = trainer_class.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans, configuration, channels, outputs, deep)
    c = configuration
    architecture = (c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import)
    return build(*architecture, channels, outputs, deep)


def planned_network(
    plans_manager: PlansManager, configuration: str, dataset_json: dict, trainer: str | None = None
) -> nn.Module:
    """Build a network with a data set's channels and labels.

    Raises:
        UserError: For channels or labels that nnU-Net cannot read, and as ``target_network``.
    """
    config = plans_manager.get_configuration(configuration)
    try:
        channels = determine_num_input_channels(plans_manager, config, dataset_json)
        outputs = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    except Exception as error:
        raise UserError(f"nnU-Net cannot read channels and labels of dataset.json: {error!r}. Correct it") from error
    return target_network(plans_manager, config, channels, outputs, trainer=trainer)


def check_stock_weights(
    file: Path, trainer_class: Any, plans: dict, configuration: str, dataset_json: dict, outputs: int | None = None
) -> dict[str, Any]:
    """Refuse weights that stock cannot load into the network.

    Files that only an unsafe unpickler opens, and networks that cannot be built on the meta device, are left to stock.
    ``outputs`` are the network's; None for one of each label.

    Returns:
        What the file says of the pretraining that made it: data set and fold among others. Empty for other files.

    Raises:
        UserError: For what is no checkpoint, and for missing or differing tensors.
    """
    try:
        content = load_tensors(file)
    except Exception as error:
        if "weights_only" in str(error).lower() and "unsupported global" in str(error).lower():
            return {}
        raise UserError(
            f"{file} is no checkpoint that can be read ({type(error).__name__}). Give a .pth file"
        ) from error
    weights = content.get("network_weights") if isinstance(content, dict) else None
    manager = PlansManager(plans)
    run = RunName(manager.dataset_name, configuration, "", manager.plans_name, trainer_class.__name__)
    words = [dataset_word(run.dataset), "-c", run.configuration, *run.options(), "-o", "FILE"]
    config = manager.get_configuration(configuration)
    if hasattr(trainer_class, "method_class"):
        advice = f"Give it to nnssl_ext plan as start_from={file}, which fits it"
    elif config.previous_stage_name:
        advice = "A cascade stage takes weights of a cascade stage only. Train it from scratch"
    else:
        advice = f"Fit it with {shlex.join(['nnssl_ext', 'transfer', str(file), '-d', *words])}"
    if not isinstance(weights, dict):
        raise UserError(f"{file} has no 'network_weights', which nnU-Net expects. {advice}")
    try:
        channels = determine_num_input_channels(manager, config, dataset_json)
        outputs = outputs or manager.get_label_manager(dataset_json).num_segmentation_heads
        with torch.device("meta"):
            network = _build(trainer_class, manager, config, channels, outputs, True)
    except (Exception, NetworkError):  # a user's own trainer may need a real device
        return {}
    wrong = [line for name, tensor in network.state_dict().items() if (line := _misfit(name, tensor, weights))]
    if wrong:
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise UserError(f"{file} does not fit the network of plans {manager.plans_name}: {wrong[0]}{more}. {advice}")
    own = content.get("nnssl_ext")
    return own.get("identity") or {} if isinstance(own, dict) else {}


def _misfit(name: str, tensor: Tensor, weights: dict[str, Any]) -> str:
    if HEADS in name:  # stock leaves them as they are
        return ""
    if not isinstance(weights.get(name), Tensor):
        return f"'{name}' is missing"
    if weights[name].shape != tensor.shape:
        return f"'{name}' is {tuple(weights[name].shape)} there, expected {tuple(tensor.shape)}"
    return ""
