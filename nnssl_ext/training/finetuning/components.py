"""Group a network's parameters, schedule them, and average weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS, OptimizerRecipe
from nnssl_ext.networks.backbone import HEADS, backbone_of
from nnssl_ext.settings import PLANS_KEY, CommonSettings, FinetuneSettings, split_sections
from nnssl_ext.training.optimization import fill_momentum, learning_rate_at
from nnssl_ext.views import random

#: Peak learning rates where the settings name none.
PEAK = {"sgd": 1e-2, "adamw": 1e-3}
#: Names of the phases by the number of frozen components.
PHASES = ("everything", "decoder and heads", "heads")


def finetune_settings(plans: dict) -> tuple[CommonSettings, FinetuneSettings]:
    """Read and check a plans file's settings. Lengths below 1 become shares of the steps."""
    where = f"plans {plans['plans_name']}"
    common, sections = split_sections(plans.get(PLANS_KEY, {}), SCHEMAS, where)
    settings: FinetuneSettings = sections["finetune"]
    late = [step for step in settings.snapshots if step > settings.steps]
    if late:
        raise UserError(f"{where}: finetune.snapshots has {late}, beyond finetune.steps={settings.steps}")
    lengths: dict[str, Any] = {}
    for name in ("warmup", "head_only_steps", "freeze_encoder_steps"):
        given = getattr(settings, name)
        if given >= settings.steps:
            raise UserError(f"{where}: finetune.{name}={given:g} leaves none of {settings.steps} steps")
        lengths[name] = int(given if given >= 1 else given * settings.steps)
    return common, replace(settings, **lengths)


def rate_at(settings: FinetuneSettings, peak: float, step: int) -> float:
    """Return the learning rate of a step. There is one schedule over all steps, or one for each phase (sawtooth)."""
    start, end = 0, settings.steps
    if settings.restart_schedule:
        first, last = int(settings.head_only_steps), int(settings.freeze_encoder_steps)
        for bound in sorted({first, max(first, last)} - {0}):  # nothing is released before the first
            start, end = (bound, end) if step >= bound else (start, min(end, bound))
    length = end - start
    share = min(settings.warmup / length, 0.5) if settings.restart_schedule else settings.warmup / length
    return learning_rate_at(
        OptimizerRecipe(settings.optimizer, peak, settings.weight_decay, settings.schedule, share),
        peak,
        step - start,
        length,
    )


def parameter_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Group parameters by component: encoder, decoder and heads."""
    network = unwrapped(network)
    groups: dict[str, list[nn.Parameter]] = {"encoder": [], "decoder": [], "heads": []}
    encoder = {id(parameter) for layer in encoder_layers(network) for parameter in layer}
    for name, parameter in network.named_parameters():
        groups["encoder" if id(parameter) in encoder else component_of(name)].append(parameter)
    return groups


def encoder_layers(network: nn.Module) -> list[list[nn.Parameter]]:
    """Return the encoder's parameters layer by layer from the input. Those of an unknown network are one layer."""
    network = unwrapped(network)  # a wrapper is of no known kind
    try:
        return backbone_of(network).layers()
    except ValueError:
        return [[parameter for name, parameter in network.named_parameters() if component_of(name) == "encoder"]]


def build_optimizer(network: nn.Module, settings: FinetuneSettings, learning_rate: float) -> torch.optim.Optimizer:
    """Build the optimizer with one group per component. Settings may name none that the network lacks."""
    s, groups = settings, parameter_groups(network)
    if (s.encoder_lr_scale != 1 or s.freeze_encoder_steps) and not groups["encoder"]:
        raise UserError("finetune.encoder_lr_scale and freeze_encoder_steps need a network with an 'encoder'")
    if s.head_only_steps and not groups["heads"]:
        raise UserError("finetune.head_only_steps needs a network with 'seg_layers'")
    described: list[dict[str, Any]] = []
    if s.layer_decay != 1:
        layers = encoder_layers(network)
        for depth, layer in enumerate(layers):
            scale = s.layer_decay ** (len(layers) - depth)
            described.append({"params": layer, "part": "encoder", "lr_scale": scale})
        groups["encoder"] = []
    described += [{"params": parameters, "part": part} for part, parameters in groups.items() if parameters]
    if s.plain_norms:
        described = [half for group in described for half in _without_decay(group)]
    # one kernel for all parameters, and an overflow in float16 skips the step without the host waiting
    fused = True if {p.device.type for p in network.parameters()} == {"cuda"} else None
    if s.optimizer == "adamw":
        return torch.optim.AdamW(described, learning_rate, weight_decay=s.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(
        described, learning_rate, weight_decay=s.weight_decay, momentum=0.99, nesterov=True, fused=fused
    )
    for group in optimizer.param_groups if fused else []:
        fill_momentum(optimizer, group["params"])
    return optimizer


def _without_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split off vectors, which have no weight decay. Norms and biases are vectors."""
    weights = [parameter for parameter in group["params"] if parameter.ndim > 1]
    vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
    halves = [{**group, "params": weights}, {**group, "params": vectors, "weight_decay": 0.0}]
    return [half for half in halves if half["params"]]


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without DDP and torch.compile."""
    network = network.module if isinstance(network, DistributedDataParallel) else network
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def component_of(name: str) -> str:
    """Return the component that a parameter's name belongs to."""
    name = f".{name.removeprefix('module.').removeprefix('_orig_mod.')}"
    return "heads" if HEADS in name else "encoder" if name.startswith(".encoder.") else "decoder"


def frozen_components(settings: FinetuneSettings, step: int) -> tuple[str, ...]:
    """Return the components that are frozen in a step."""
    if step < settings.head_only_steps:
        return ("encoder", "decoder")
    return ("encoder",) if step < settings.freeze_encoder_steps else ()


def hold_statistics(network: nn.Module, settings: FinetuneSettings, frozen: tuple[str, ...]) -> None:
    """Freeze the running statistics of frozen components."""
    if not (settings.head_only_steps or settings.freeze_encoder_steps):
        return
    held = {id(parameter) for part in frozen for parameter in parameter_groups(network)[part]}
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train(id(module.weight) not in held)


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Average a network's weights exponentially.

    The first update copies the weights. The decay of update t is at most (1 + t) / (10 + t). Buffers are copied.
    """

    def lerp(averaged: PARAM_LIST, trained: PARAM_LIST, _: torch.Tensor | int) -> None:
        updates = int(model.n_averaged)  # on the host, while torch hands over a copy on the device
        torch._foreach_lerp_(averaged, trained, 1 - min(decay, (1 + updates) / (10 + updates)))

    model = AveragedModel(network, multi_avg_fn=lerp).requires_grad_(False)
    return model


def predict_alone(network: nn.Module) -> None:
    """Keep forward passes from waiting for other processes. The others predict other cases or none."""
    if isinstance(network, DistributedDataParallel):
        network.require_forward_param_sync = False


def to_device(tensors: Any, device: torch.device) -> Any:
    """Send tensors to a device, without waiting for a GPU."""
    if isinstance(tensors, list):
        return [random.to_device(tensor, device) for tensor in tensors]
    return random.to_device(tensors, device)


@contextmanager
def other_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Load other weights into the network within a block."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)
    try:
        yield
    finally:
        network.load_state_dict(before)


def weighted_for(loss: nn.Module, several: bool) -> nn.Module:
    """Give each output of deep supervision a weight where several processes train.

    DDP waits for a gradient of every parameter. Stock leaves the coarsest output out, and only a network that is
    compiled as a whole returns zeros for it. One with synchronized batch norms is not.
    """
    if several and isinstance(loss, DeepSupervisionWrapper):
        loss.weight_factors = tuple(weight or 1e-6 for weight in loss.weight_factors)  # stock's without compiling
    return loss
