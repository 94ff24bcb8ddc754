"""The parts of a fine-tuning, by themselves."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import nn

from nnssl_ext.recipe import load_recipe
from nnssl_ext.settings import FinetuneSettings
from nnssl_ext.training.finetuning.components import (
    build_optimizer,
    encoder_layers,
    finetune_settings,
    frozen_components,
    hold_statistics,
    moving_average,
    parameter_groups,
    rate_at,
    to_device,
    weighted_for,
)
from nnssl_ext.training.finetuning.state import on_host
from tests.support.networks import network


def test_phases() -> None:
    settings = FinetuneSettings(head_only_steps=3, freeze_encoder_steps=6)
    parts = [frozen_components(settings, step) for step in range(8)]
    assert parts == [("encoder", "decoder")] * 3 + [("encoder",)] * 3 + [()] * 2


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    net = Normed().train()
    settings = FinetuneSettings(freeze_encoder_steps=1)
    hold_statistics(net, settings, frozen_components(settings, 0))
    assert (net.encoder.training, net.decoder.training) == (False, True)
    hold_statistics(net, settings, frozen_components(settings, 1))
    assert (net.encoder.training, net.decoder.training) == (True, True)


def test_groups_hold_every_parameter_once() -> None:
    for kind in ("plain", "residual"):
        net = network(kind, 2, 3)
        groups = parameter_groups(net)
        found = [p for part in groups.values() for p in part]
        assert len(found) == len(set(map(id, found))) == len(list(net.parameters()))
        assert {id(p) for p in net.encoder.parameters()} == {id(p) for p in groups["encoder"]}  # type: ignore[union-attr]


def test_the_moving_average_forgets_its_start() -> None:
    layer: Any = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    averaged: Any = moving_average(layer, 0.99)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for _ in range(400):
        averaged.update_parameters(layer)
    assert averaged.module.weight.item() == pytest.approx(1.0, abs=0.02)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    averaged.update_parameters(layer)
    assert 1.0 < averaged.module.weight.item() < 1.03


def recipe(name: str, steps: int = 1000) -> FinetuneSettings:
    """Read the fine-tuning settings of a recipe for a number of steps."""
    section = load_recipe(name).settings["finetune"]
    plans = {"plans_name": "p", "nnssl_ext": {"finetune": {**section, "steps": steps}}}
    return finetune_settings(plans)[1]


def test_a_schedule_rises_and_falls_once() -> None:
    settings = recipe("finetune_pretrained")
    rates = [rate_at(settings, 1e-3, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 50)
    assert max(rates) == rates[49] == pytest.approx(1e-3)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_a_sawtooth_rises_again_when_the_encoder_is_released() -> None:
    settings = recipe("finetune_sawtooth")
    assert settings.freeze_encoder_steps == 100
    rates = [rate_at(settings, 1e-3, step) for step in range(1000)]
    assert rates[49] == rates[149] == pytest.approx(1e-3)
    assert rates[99] < 0.1e-3
    assert rates[100] == pytest.approx(1e-3 / 50)
    assert frozen_components(settings, 99) == ("encoder",)
    assert frozen_components(settings, 100) == ()


@pytest.mark.parametrize("kind", ["plain", "residual", "vit", "pct_net"])
def test_layer_decay_and_freezing_know_the_encoder_of_every_network(kind: str) -> None:
    net = network(kind, 1, 3)
    layers = encoder_layers(net)
    encoder = {id(parameter) for layer in layers for parameter in layer}
    assert encoder == {id(parameter) for parameter in parameter_groups(net)["encoder"]} != set()
    optimizer = build_optimizer(net, recipe("finetune_transformer"), 1e-4)
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == len(list(net.parameters()))
    for depth, layer in enumerate(layers):
        assert all(scales[id(p)] == pytest.approx(0.75 ** (len(layers) - depth)) for p in layer)
    assert {scales[id(p)] for p in net.parameters() if id(p) not in encoder} == {1.0}
    vectors = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {id(p) for p in vectors} == {id(p) for p in net.parameters() if p.ndim <= 1} != set()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0, 0.05}
    # nnU-Net compiles before it asks for the optimizer
    wrapped: Any = torch.compile(net)
    compiled = build_optimizer(wrapped, recipe("finetune_transformer"), 1e-4)
    for one, other in zip(optimizer.param_groups, compiled.param_groups, strict=True):
        assert (one["part"], one.get("lr_scale")) == (other["part"], other.get("lr_scale"))
        assert list(map(id, one["params"])) == list(map(id, other["params"]))


def test_the_schedule_restarts_only_where_something_is_released() -> None:
    """The encoder stays frozen while the heads train alone."""
    settings = FinetuneSettings(steps=12, head_only_steps=6, freeze_encoder_steps=3, restart_schedule=True)
    alone = FinetuneSettings(steps=12, head_only_steps=6, restart_schedule=True)
    assert [frozen_components(settings, step) for step in range(12)] == [
        frozen_components(alone, step) for step in range(12)
    ]
    assert [rate_at(settings, 1.0, step) for step in range(12)] == [rate_at(alone, 1.0, step) for step in range(12)]


def test_several_processes_train_every_output() -> None:
    for several, last in ((False, 0.0), (True, 1e-6)):
        loss = DeepSupervisionWrapper(nn.L1Loss(), (0.5, 0.5, 0.0))
        assert weighted_for(loss, several).weight_factors == (0.5, 0.5, last)
    plain = nn.L1Loss()
    assert weighted_for(plain, True) is plain


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_only_copies_to_cuda_are_not_waited_for(kind: str) -> None:
    """MPS of torch before 2.13 reads a source that may be freed."""
    tensor, device = Mock(), torch.device(kind)
    to_device([tensor], device)
    tensor.to.assert_called_once_with(device, non_blocking=kind == "cuda")


def test_losses_of_a_gpu_are_read_as_stock_collects_them() -> None:
    outputs: list[dict[str, Any]] = [{"loss": np.array(1.5, np.float32)}, {"loss": torch.tensor(2.5)}]
    assert on_host(outputs) is outputs
    losses = collate_outputs(outputs)["loss"]
    assert isinstance(losses, np.ndarray)
    assert losses.ravel().tolist() == [1.5, 2.5]
