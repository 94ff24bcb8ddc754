"""Every method compiled, as nnU-Net does by default on GPUs: traced by Dynamo and AOTAutograd, on the CPU."""

import math
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from nnssl_ext import checkpoint
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from tests.conftest import Environment
from tests.support.runs import pretrain

Data = Callable[[str], Environment]
RUN = {"epochs": 1, "iterations_per_epoch": 5, "validation_iterations": 2, "precision": "float32"}


@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_learns_the_same_and_stays_compiled(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    environment, trainer = with_data("plain"), TRAINERS[method]
    environment.write_plans("plain", "eager", RUN)
    environment.write_plans("plain", "compiled", RUN)
    eager = checkpoint.load(pretrain(environment, "plain", "eager", trainer=trainer) / "checkpoint_final.pth")
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(PretrainingTrainer, "_do_i_compile", lambda _: True)
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    # what is compiled anew at each step, for a number that changes, is soon not compiled at all
    known = "recompile" if hasattr(torch._dynamo.config, "recompile_limit") else "cache"  # before torch 2.7
    limit = {"recompile_limit" if known == "recompile" else "cache_size_limit": 4, f"fail_on_{known}_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        compiled = checkpoint.load(pretrain(environment, "plain", "compiled", trainer=trainer) / "checkpoint_final.pth")
    assert counters["stats"]["unique_graphs"] > 0
    for key in ("train_losses", "val_losses"):
        assert math.isfinite(compiled["logging"][key][0])
        assert compiled["logging"][key][0] == pytest.approx(eager["logging"][key][0], rel=1e-3)


@pytest.mark.skipif(not os.environ.get("INDUCTOR"), reason="a minute of compilation, part of make soak")
@pytest.mark.parametrize("method", ["volume_fusion"])
def test_inductor_generates_code_in_bfloat16(with_data: Data, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The default on GPUs: code is generated, under autocast, and the first losses are those of eager mode."""
    monkeypatch.setattr("nnssl_ext.training.pretraining.log.PretrainingLog.plot_progress_png", lambda *_: None)
    environment, trainer = with_data("plain"), TRAINERS[method]
    run = {**RUN, "iterations_per_epoch": 2, "validation_iterations": 1, "precision": "bfloat16"}
    losses = {}
    for name, compiled in (("eager", False), ("inductor", True)):
        environment.write_plans("plain", name, run)
        torch._dynamo.reset()
        counters.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PretrainingTrainer, "_do_i_compile", lambda _, answer=compiled: answer)
            folder = pretrain(environment, "plain", name, trainer=trainer)
        losses[name] = checkpoint.load(folder / "checkpoint_final.pth")["logging"]["train_losses"][0]
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["inductor"]
    assert losses["inductor"] == pytest.approx(losses["eager"], rel=2e-2)
