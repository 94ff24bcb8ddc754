"""The parts of a fine-tuning, by themselves."""

from typing import Any

import pytest
import torch

from nnssl_ext.settings import FinetuneSettings
from nnssl_ext.training.finetuning.components import (
    MovingAverage,
    frozen_components,
    hold_statistics,
    parameter_groups,
)
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
    averaged: Any = MovingAverage(layer, 0.99)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for _ in range(400):
        averaged.update()
    assert averaged.module.weight.item() == pytest.approx(1.0, abs=0.02)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    averaged.update()
    assert 1.0 < averaged.module.weight.item() < 1.03
