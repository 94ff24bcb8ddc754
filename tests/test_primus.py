"""Primus, which nnU-Net's own trainers build: pretrained through ``target_trainer``, loaded by the stock trainer."""

from collections.abc import Callable

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl_ext import checkpoint
from nnssl_ext.methods import TRAINERS
from nnssl_ext.networks.backbone import backbone_of
from tests.conftest import Environment
from tests.support.runs import STOCK, pretrain, trainer_for

Data = Callable[[str], Environment]
SMALL = {"local_crops": 1, "hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 64}


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("method", ["dino", "masked_autoencoder", "rotation"])
def test_the_stock_trainer_loads_what_was_learned(with_data: Data, method: str) -> None:
    environment, trainer = with_data("plain"), TRAINERS[method]
    settings = {"epochs": 1, "target_trainer": STOCK, "dino": {**SMALL, "teacher_momentum": 0.5}}
    environment.write_plans("plain", "primus", settings)
    file = pretrain(environment, "plain", "primus", trainer=trainer) / "checkpoint_final.pth"
    weights = checkpoint.load(file)["network_weights"]

    stock = trainer_for("plain", "primus", STOCK)
    maybe_load_checkpoint(stock, False, False, str(file))
    fresh = trainer_for("plain", "primus", STOCK)
    fresh.initialize()
    loaded = stock.network.state_dict()
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    backbone = backbone_of(stock.network)
    heads = {name for name in loaded if backbone.is_head(name)}
    assert {name: value.shape for name, value in loaded.items()} == {
        name: value.shape for name, value in fresh.network.state_dict().items()
    }
    environment.write_plans("plain", "still", {**settings, "learning_rate": 0.0})
    still = checkpoint.load(pretrain(environment, "plain", "still", trainer=trainer) / "checkpoint_final.pth")
    weighty = {name for name, value in weights.items() if value.is_floating_point()} - heads
    changed = {name for name in weighty if not torch.equal(weights[name], still["network_weights"][name])}
    assert len(changed) > 0.9 * len(weighty)
    trained = set(checkpoint.load(file)["nnssl_ext"]["trained"])
    assert trained >= {name for name, _ in stock.network.named_parameters()} - heads
