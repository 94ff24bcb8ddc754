"""The parts of a fine-tuning: its settings, which parameters learn when, and the weights that are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS
from nnssl_ext.networks.backbone import HEADS
from nnssl_ext.settings import PLANS_KEY, CommonSettings, FinetuneSettings, split_sections

#: Peak rates where the settings name none.
PEAK = {"sgd": 1e-2, "adamw": 1e-3}


def finetune_settings(plans: dict) -> tuple[CommonSettings, FinetuneSettings]:
    """The checked settings of a plans file.

    Raises:
        UserError: For an unknown setting, and for steps that lie beyond the end.
    """
    where = f"plans {plans['plans_name']}"
    common, sections = split_sections(plans.get(PLANS_KEY, {}), SCHEMAS, where)
    settings: FinetuneSettings = sections["finetune"]
    late = [step for step in settings.snapshots if step > settings.steps]
    if late:
        raise UserError(f"{where}: finetune.snapshots has {late}, beyond finetune.steps={settings.steps}")
    for name in ("warmup", "head_only_steps", "freeze_encoder_steps"):
        if getattr(settings, name) >= settings.steps:
            raise UserError(f"{where}: finetune.{name}={getattr(settings, name)} leaves none of {settings.steps} steps")
    return common, settings


def parameter_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a segmentation network: its encoder's, its heads', and the rest (``decoder``)."""
    groups: dict[str, list[nn.Parameter]] = {"encoder": [], "decoder": [], "heads": []}
    for name, parameter in network.named_parameters():
        groups[part_of(name)].append(parameter)
    return groups


def part_of(name: str) -> str:
    """The part that a parameter belongs to by its name: ``encoder``, ``decoder`` or ``heads``."""
    name = f".{name.removeprefix('module.').removeprefix('_orig_mod.')}"
    return "heads" if HEADS in name else "encoder" if name.startswith(".encoder.") else "decoder"


def frozen_parts(settings: FinetuneSettings, step: int) -> tuple[str, ...]:
    """The parts that the step after ``step`` others leaves as they are."""
    if step < settings.head_only_steps:
        return ("encoder", "decoder")
    return ("encoder",) if step < settings.freeze_encoder_steps else ()


def hold_statistics(network: nn.Module, settings: FinetuneSettings, frozen: tuple[str, ...]) -> None:
    """Batch norm of parts that are left as they are keeps its running statistics, and uses them."""
    if not (settings.head_only_steps or settings.freeze_encoder_steps):
        return
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            module.train(part_of(name + ".weight") not in frozen)


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a network's weights, which starts with short memory: the decay of update t is at
    most (1 + t) / (10 + t)."""

    def average(averaged: Any, new: Any, count: torch.Tensor | int) -> None:
        t = float(count)  # once a step, where a function of single tensors would wait for a GPU at each of them
        torch._foreach_lerp_(averaged, new, 1 - min(decay, (1 + t) / (10 + t)))

    return AveragedModel(network, multi_avg_fn=average)


def predict_alone(network: nn.Module) -> None:
    """Let no forward pass wait for other processes: they predict other cases, or none."""
    if isinstance(network, DistributedDataParallel):
        network.require_forward_param_sync = False


class OtherWeights:
    """Within the block the network holds other weights."""

    def __init__(self, network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.network, self.weights = network, weights

    def __enter__(self) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.weights)

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.before)
