import math

import pytest
import torch

from nnssl_ext.losses.health import (
    effective_rank,
    entropies,
    feature_deviation,
    off_diagonal_cosine,
    retrieval_accuracy,
)


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


def test_cosine_of_all_alike_is_one_and_of_all_directions_none() -> None:
    assert off_diagonal_cosine(torch.ones(5, 3)) == pytest.approx(1)
    assert off_diagonal_cosine(torch.eye(6)) == pytest.approx(0)
    assert off_diagonal_cosine(torch.ones(1, 3)) == 0


def test_retrieval_finds_what_is_like_and_chance_what_is_not() -> None:
    first = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert retrieval_accuracy(first, 3 * first + 100) == 1
    assert retrieval_accuracy(first, first.roll(1, 0)) == 0


def test_entropy_and_information_of_targets() -> None:
    same, uniform, each = torch.eye(4)[[0] * 8], torch.full((8, 4), 0.25), torch.eye(4).repeat(2, 1)
    for distributions, entropy, information in ((same, 0, 0), (uniform, 1, 0), (each, 0, math.log(4))):
        found = [value.item() for value in entropies(distributions.split(3))]
        assert found == pytest.approx([entropy, information], abs=1e-5)


def test_rank_of_features_that_are_not_finite_is_no_number() -> None:
    features = torch.randn(5, 3)
    features[2, 1] = torch.inf
    assert effective_rank(features).isnan()
