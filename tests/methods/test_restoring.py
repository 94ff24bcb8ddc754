from pathlib import Path

import pytest
import torch

from nnssl_ext.losses.reconstruction import explained_variance, squared_error
from nnssl_ext.methods import METHODS
from nnssl_ext.methods.restoring import RestoringMethod
from tests.methods.helpers import build, views_of, write_cases


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, RestoringMethod)])
def test_the_control_is_the_same_restoration_of_shuffled_voxels(tmp_path: Path, name: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings()).eval()
    views = views_of(write_cases(tmp_path), method, [0, 1])
    with torch.no_grad():
        found = method(views)
        assert set(method.train()(views)) == {"loss"}
        restored = method.eval().restore(views["shuffled"], views)
    target, weight = views["shuffled_target"], views["weight"]
    expected = explained_variance(squared_error(restored, target, weight), target, weight)
    assert torch.equal(found["shuffled_variance"], expected)
    assert not torch.equal(found["shuffled_variance"], found["explained_variance"])
