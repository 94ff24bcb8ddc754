import subprocess
import sys

import pytest
import torch
from timm.layers import DropPath as TimmDropPath
from timm.layers import Mlp as TimmMlp

from nnssl_ext.networks.architectures.blocks import DropPath, Mlp


@pytest.mark.parametrize("probability", [0.2, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_drop_path_of_a_small_batch_is_timms_draw_for_draw(probability: float, training: bool) -> None:
    features, results = torch.randn(2, 3, 5), []
    torch.manual_seed(0)
    results.append(DropPath(probability).train(training)(features, torch.sin))
    torch.manual_seed(0)
    results.append(features + TimmDropPath(probability).train(training)(features.sin()))
    assert torch.allclose(*results)


@pytest.mark.parametrize(("samples", "probability", "kept"), [(64, 0.3, 45), (4, 0.3, 3), (2, 0.5, 1), (8, 0.0, 8)])
def test_drop_path_leaves_samples_out_of_the_branch(samples: int, probability: float, kept: int) -> None:
    features, seen = torch.randn(samples, 3, 5, dtype=torch.float64, requires_grad=True), []

    def branch(own: torch.Tensor) -> torch.Tensor:
        seen.append(len(own))
        return own.sin()

    added = DropPath(probability).train()(features, branch) - features
    assert seen == [kept]
    present = (added != 0).flatten(1).any(1)
    assert int(present.sum()) == kept
    assert torch.allclose(added[present], features.sin()[present] * samples / kept)
    (gradient,) = torch.autograd.grad(added.sum(), features)
    assert torch.allclose(gradient, features.cos() * samples / kept * present[:, None, None])


def test_drop_path_drops_each_sample_as_often() -> None:
    layer, ones = DropPath(0.3).train(), torch.ones(4, 1)
    mean = torch.stack([layer(ones, torch.ones_like) for _ in range(2000)]).mean(0) - 1
    assert mean.flatten().tolist() == pytest.approx([1.0] * 4, abs=0.06)


def test_the_perceptron_is_timms_with_the_same_names() -> None:
    ours, theirs = Mlp(6, 24, dropout=0.2), TimmMlp(6, 24, drop=0.2)
    theirs.load_state_dict(ours.state_dict())
    features, results = torch.randn(4, 6), []
    for layer in (ours, theirs):
        torch.manual_seed(0)
        results.append(layer(features))
    assert torch.equal(*results)


@pytest.mark.integration
def test_timm_is_loaded_with_primus_only() -> None:
    """All of timm takes more than a CPU second to load."""
    program = (
        "import sys, nnssl_ext.training.pretraining.trainer; assert 'timm' not in sys.modules;"
        "from dynamic_network_architectures.architectures import primus; assert 'timm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("samples", "probability"), [(2, 0.05), (10, 0.05), (4, 0.01)])
def test_a_small_probability_drops_some_samples_of_a_small_batch(samples: int, probability: float) -> None:
    torch.manual_seed(0)
    layer = DropPath(probability).train()
    added = torch.cat([layer(torch.zeros(samples, 1), torch.ones_like) for _ in range(2000)])
    assert (added == 0).float().mean() == pytest.approx(probability, rel=0.3)
    assert added.mean() == pytest.approx(1.0, abs=0.02)
