"""What each step of a fine-tuning changes, and steps that go wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext.errors import UserError
from nnssl_ext.training.finetuning.components import component_of
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
from tests.conftest import Environment
from tests.support.finetunings import RUN, final, tune

Data = Callable[[str], Environment]
pytestmark = pytest.mark.usefixtures("training_only")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each step: the trainer, which parts it changed, and the rate of each part."""
    seen: list[dict[str, Any]] = []
    original = nnsslTrainer_Finetune.train_step

    def train_step(self: Any, batch: dict) -> dict:
        before = {name: value.clone() for name, value in self.network.named_parameters()}
        result = original(self, batch)
        changed = {component_of(n) for n, value in self.network.named_parameters() if not torch.equal(before[n], value)}
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        seen.append({"trainer": self, "changed": changed, "rates": rates})
        return result

    monkeypatch.setattr(nnsslTrainer_Finetune, "train_step", train_step)
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parts_learn_when_and_as_fast_as_the_settings_say(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    environment = with_data("labelled")
    gentle = {"head_only_steps": 1, "freeze_encoder_steps": 3, "warmup": 2, "encoder_lr_scale": 0.25}
    settings = {**RUN, "steps": 5, "snapshots": [], "optimizer": optimizer, "learning_rate": 0.01, **gentle}
    environment.write_plans("labelled", "run", {"finetune": settings})
    steps = watched(monkeypatch)
    tune(environment, "labelled", "run")
    everything = {"encoder", "decoder", "heads"}
    assert [step["changed"] for step in steps] == [{"heads"}, *2 * [everything - {"encoder"}], *2 * [everything]]
    rates = [step["rates"]["decoder"] for step in steps]
    assert rates[:3] == [pytest.approx(0.005), pytest.approx(0.01), pytest.approx(0.01)]  # risen in two steps
    assert rates[2] > rates[3] > rates[4] > 0
    for step in steps:
        assert step["rates"]["heads"] == step["rates"]["decoder"]
        assert step["rates"]["encoder"] == pytest.approx(0.25 * step["rates"]["decoder"])


def test_the_moving_average_of_the_trained_weights_is_written(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    environment.write_plans(
        "labelled", "run", {"finetune": {**RUN, "snapshots": [], "steps": 3, "weight_average_decay": 0.9}}
    )
    steps = watched(monkeypatch)
    written = final(tune(environment, "labelled", "run"))["network_weights"]
    trained, averaged = (
        network.state_dict() for network in (steps[-1]["trainer"].plain_network, steps[-1]["trainer"].averaged.module)
    )
    assert all(torch.equal(written[name], averaged[name]) for name in written)
    assert any(not torch.equal(written[name], trained[name]) for name in written)


@pytest.mark.parametrize(("scaled", "bad", "ends"), [(False, 1, True), (True, 1, False), (True, 2, True)])
def test_losses_that_are_not_finite(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, scaled: bool, bad: int, ends: bool
) -> None:
    """In float16 the gradient scaler leaves such a step out, as stock does; else the weights are spoilt."""
    environment = with_data("labelled")
    environment.write_plans(
        "labelled", "run", {"finetune": {**RUN, "snapshots": [], "steps": 3}, "max_nonfinite_batches": 1}
    )
    original = nnsslTrainer_Finetune.train_step

    def train_step(self: Any, batch: dict) -> dict:
        result = original(self, batch)
        # the scaler's own kernels need a GPU: what it leaves behind is told by its being there
        self.grad_scaler = torch.amp.GradScaler("cpu") if scaled and self.step == 3 else None
        return {"loss": np.array(np.inf)} if self.step > 3 - bad else result

    monkeypatch.setattr(nnsslTrainer_Finetune, "train_step", train_step)
    if ends:
        with pytest.raises((SystemExit, UserError), match="the loss became nan in epoch 0"):
            tune(environment, "labelled", "run")
    else:
        fold = tune(environment, "labelled", "run")
        assert np.isfinite(final(fold)["logging"]["train_losses"]).all()
