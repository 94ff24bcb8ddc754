"""Weights for fine-tuning have their initial lengths; runs continue with the trained ones."""

from collections.abc import Callable

import pytest
import torch

from nnssl_ext import checkpoint
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
    assert raw["weight_lengths"] == {"restored": False, "factors": {}}
    assert scaled["weight_lengths"]["restored"]
    factors, lengths = scaled["weight_lengths"]["factors"], scaled["initial_lengths"]
    assert set(factors) == set(lengths)
    for name, length in lengths.items():
        trained, written = (contents[which]["network_weights"][name] for which in ("raw", "scaled"))
        assert written.norm().item() == pytest.approx(length, rel=1e-5)
        torch.testing.assert_close(written, trained * factors[name])
    assert any(abs(factor - 1) > 1e-4 for factor in factors.values())
