"""Exact inference over paired runs, against values worked out elsewhere."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp

from nnssl_ext.study.statistics import (
    case_wilcoxon,
    effect,
    holm,
    random_effect,
    sign_flip_interval,
    sign_flip_p,
)

#: Darwin's maize, Fisher 1935, The Design of Experiments, section 21: differences in eighths of an inch.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_fishers_own_example() -> None:
    # Fisher counted 863 of 2^15 at or beyond the observed sum on one side, 1726 on both
    assert sign_flip_p(DARWIN) == pytest.approx(1726 / 2**15, abs=1e-12)


def brute_force(values: list[float]) -> float:
    observed = abs(sum(values))
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(flip >= observed - 1e-12 for flip in flips) / len(flips)


@pytest.mark.parametrize("pairs", [2, 5, 8])
def test_p_by_brute_force(pairs: int) -> None:
    values = np.random.default_rng(pairs).normal(0.3, 1, pairs).tolist()
    assert sign_flip_p(values) == pytest.approx(brute_force(values), abs=1e-12)


def test_many_pairs_are_drawn() -> None:
    values = np.random.default_rng(0).normal(0.5, 1, 20)
    scipys = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert sign_flip_p(values) == pytest.approx(scipys.pvalue, abs=0.006)


@pytest.mark.parametrize("pairs", [6, 8, 10])
def test_the_interval_is_the_tests_inversion(pairs: int) -> None:
    values = np.random.default_rng(pairs).normal(0.2, 1, pairs)
    low, high = sign_flip_interval(values)
    assert low < values.mean() < high
    for limit, inwards in ((low, 1e-6), (high, -1e-6)):
        assert brute_force((values - limit - inwards).tolist()) > 0.05 - 1e-9
        assert brute_force((values - limit + 1e3 * inwards).tolist()) <= 0.05 + 1e-9


def test_drawn_signs_give_p_and_interval_that_agree() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, 18)
    low, high = sign_flip_interval(values)
    for limit, inwards in ((low, 1e-6), (high, -1e-6)):
        assert sign_flip_p(values - limit - inwards) > 0.05 > sign_flip_p(values - limit + inwards) - 1e-4


def test_few_pairs_have_no_interval_and_cannot_be_significant() -> None:
    for pairs in range(1, 6):
        found = effect([0.1 + 0.001 * n for n in range(pairs)])
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert found.p > 0.05
    assert effect([0.1] * 6).low == pytest.approx(0.1)


def test_coverage_of_the_interval() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        low, high = sign_flip_interval(generator.normal(1.0, 0.5, 8))
        inside += low <= 1.0 <= high
    assert inside / 1000 == pytest.approx(0.953, abs=3 * math.sqrt(0.95 * 0.05 / 1000))


def test_no_difference_is_no_effect() -> None:
    assert effect([0.0] * 8).p == 1.0
    with pytest.raises(ValueError, match="finite"):
        effect([0.1, math.nan])


def test_holm() -> None:
    # statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03, 0.005], method="holm")[1]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_case_wilcoxon_ignores_cases_without_the_class() -> None:
    assert case_wilcoxon([0.1, 0.2, math.nan, 0.3, 0.25, 0.15, 0.12]) == pytest.approx(2 / 2**6)
    assert case_wilcoxon([0.0, 0.0]) == 1.0


def test_pretraining_runs_are_a_random_effect() -> None:
    groups = [[0.01, 0.03], [0.05, 0.02], [0.00, 0.04]]
    reference = ttest_1samp([np.mean(group) for group in groups], 0)
    interval = reference.confidence_interval(0.95)
    found = random_effect(groups)
    assert (found.p, found.low, found.high) == pytest.approx((reference.pvalue, interval.low, interval.high))
    assert (found.pairs, found.pretrainings) == (6, 3)
    assert random_effect([[0.1, 0.2]]).p == 1.0
