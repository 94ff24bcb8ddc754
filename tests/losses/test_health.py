import pytest
import torch

from nnssl_ext.losses.health import effective_rank, feature_deviation


def test_collapse_shows_in_both_and_a_common_mean_hides_nothing() -> None:
    features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert feature_deviation(features).item() == pytest.approx(1, abs=0.1)
    assert effective_rank(features).item() > 7.5
    for shift in (0.0, 100.0):
        one_direction = torch.outer(features[:, 0], torch.ones(8)) + shift
        assert effective_rank(one_direction).item() == pytest.approx(1, abs=0.1)
    same = torch.full((200, 8), 3.0)
    assert feature_deviation(same) == 0
    assert effective_rank(same) == 0


def test_one_sample_is_no_error() -> None:
    assert effective_rank(torch.ones(1, 4)) == 0
    assert feature_deviation(torch.ones(1, 4)) == 0
