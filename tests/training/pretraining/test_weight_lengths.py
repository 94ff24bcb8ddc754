"""Weights for fine-tuning can have their initial lengths; runs continue with the trained ones."""

from collections.abc import Callable

import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.recipe import read_json
from tests.conftest import Environment
from tests.support.runs import pretrain

Data = Callable[[str], Environment]


def test_only_the_weights_for_fine_tuning_are_scaled(with_data: Data) -> None:
    environment, contents = with_data("plain"), {}
    for name, restore in (("raw", False), ("scaled", True)):
        environment.write_plans("plain", name, {"restore_weight_lengths": restore})
        contents[name] = checkpoint.load(pretrain(environment, "plain", name) / "checkpoint_final.pth")
    raw, scaled = (contents[name]["nnssl_ext"] for name in ("raw", "scaled"))
    assert all(torch.equal(tensor, scaled["state"][key]) for key, tensor in raw["state"].items())
    assert not raw["weight_lengths"]["restored"]
    assert scaled["weight_lengths"]["restored"]
    assert raw["weight_lengths"]["factors"] == scaled["weight_lengths"]["factors"]
    factors, lengths = scaled["weight_lengths"]["factors"], scaled["initial_lengths"]
    assert set(factors) == set(lengths)
    for name, length in lengths.items():
        trained, written = (contents[which]["network_weights"][name] for which in ("raw", "scaled"))
        assert written.norm().item() == pytest.approx(length, rel=1e-5)
        torch.testing.assert_close(written, trained * factors[name])
    assert any(abs(factor - 1) > 1e-4 for factor in factors.values())


def test_the_summary_says_how_long_weights_are(with_data: Data) -> None:
    """By default they stay as trained."""
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1, "learning_rate": 0.01})
    fold = pretrain(environment, "plain", "run")
    summary = read_json(fold / "pretraining_summary.json")["weight_lengths"]
    factors = checkpoint.load(fold / "checkpoint_final.pth")["nnssl_ext"]["weight_lengths"]["factors"]
    assert not summary["restored"]
    assert summary["longest"] == pytest.approx(1 / min(factors.values()), rel=1e-5)
    text = next(fold.glob("training_log*")).read_text()
    assert f"have {summary['median']:.2f} times their initial length (median): relative to it, a step" in text
    assert "to fine-tune by Adam or AdamW, first run nnssl_ext transfer with --lengths initial" in text
