import subprocess
import sys

import pytest
import torch
from timm.layers import DropPath as TimmDropPath
from timm.layers import Mlp as TimmMlp

from nnssl_ext.networks.architectures.blocks import DropPath, Mlp


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_drop_path_is_timms_draw_for_draw(probability: float, training: bool) -> None:
    branch, results = torch.randn(64, 3, 5), []
    for layer in (DropPath(probability), TimmDropPath(probability)):
        torch.manual_seed(0)
        results.append(layer.train(training)(branch))
    assert torch.allclose(*results)
    dropped = int((results[0].flatten(1) == 0).all(1).sum())
    assert (dropped > 0) == (training and probability > 0)


def test_the_perceptron_is_timms_with_the_same_names() -> None:
    ours, theirs = Mlp(6, 24, dropout=0.2), TimmMlp(6, 24, drop=0.2)
    theirs.load_state_dict(ours.state_dict())
    features, results = torch.randn(4, 6), []
    for layer in (ours, theirs):
        torch.manual_seed(0)
        results.append(layer(features))
    assert torch.equal(*results)


def test_timm_is_loaded_with_primus_only() -> None:
    """All of timm takes more than a CPU second to load."""
    program = (
        "import sys, nnssl_ext.training.pretraining.trainer; assert 'timm' not in sys.modules;"
        "from dynamic_network_architectures.architectures import primus; assert 'timm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
