"""Infer over paired runs: exact tests and intervals.

The unit is the paired run: the same label subset and seed, with and without pretraining. Cases of one trained network
share that run's luck. A test over cases finds effects where there are none (``benchmarks/simulation.py`` shows how
often).

R paired runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t, wilcoxon

#: Sign flips are enumerated up to this many pairs. Beyond it, this many are drawn.
MAX_EXACT, DRAWN = 16, 100_000
#: Confidence of the intervals of effects.
LEVEL = 0.95


@dataclass(frozen=True)
class Effect:
    """A mean difference over paired runs.

    Attributes:
        mean: Of the R differences.
        low, high: Its interval. Infinite where R is too small for one.
        p: Two-sided p value.
        pairs: R.
        pretrainings: Pretraining runs that the interval is about. 1: about one run's weights.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int
    pretrainings: int = 1


def effect(differences: Sequence[float]) -> Effect:
    """Compute mean, exact interval and exact p.

    They are of R paired differences; p is two-sided.

    Raises:
        ValueError: Without any difference, or with one that is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite differences of at least one pair, got {differences!r}")
    low, high = sign_flip_interval(values)
    return Effect(float(values.mean()), low, high, sign_flip_p(values), len(values))


def random_effect(differences: Sequence[Sequence[float]]) -> Effect:
    """Compute mean, interval and p where pretraining runs vary.

    The model is mean + pretraining run + pair. With equally many pairs per run, the means of the runs are independent
    and normal, and Student's t with (runs - 1) degrees of freedom is exact (Searle et al., Variance Components, 1992).
    Two runs give one degree of freedom: the interval reaches 12.7 standard errors to each side.

    Args:
        differences: Paired differences, one sequence per pretraining run.

    Raises:
        ValueError: Without any difference, or with one that is not finite.
    """
    groups = [np.asarray(group, dtype=float) for group in differences if len(group)]
    if not groups or not all(np.isfinite(group).all() for group in groups):
        raise ValueError(f"expected finite differences of at least one pair, got {differences!r}")
    means = np.array([group.mean() for group in groups])
    pairs, mean, runs = sum(map(len, groups)), float(means.mean()), len(groups)
    if runs < 2:
        return Effect(mean, -math.inf, math.inf, 1.0, pairs, runs)
    error = float(means.std(ddof=1)) / math.sqrt(runs)
    if error == 0:
        return Effect(mean, mean, mean, float(mean == 0), pairs, runs)
    reach = float(t.ppf((1 + LEVEL) / 2, runs - 1)) * error
    return Effect(mean, mean - reach, mean + reach, float(2 * t.sf(abs(mean) / error, runs - 1)), pairs, runs)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Compute the two-sided p under random signs.

    Fisher, The Design of Experiments, 1935.

    It is exact if each difference is symmetric about zero without a gain. Signs are enumerated up to ``MAX_EXACT``
    pairs, otherwise drawn with a fixed seed.
    """
    return float(sign_flip_ps(np.asarray(differences, dtype=float)[None])[0])


def sign_flip_ps(studies: np.ndarray) -> np.ndarray:
    """Compute ``sign_flip_p`` of many studies: (S, R) -> (S,)."""
    signs = 1.0 - 2.0 * _flipped(studies.shape[1])
    result = np.empty(len(studies))
    for row, differences in enumerate(studies):
        sums = np.abs(signs @ differences)
        result[row] = np.mean(sums >= sums[0] * (1 - 1e-9) if sums[0] else np.ones(1))
    return result


def _flipped(pairs: int) -> np.ndarray:
    """Choose the pairs whose sign is flipped: (N, pairs) bool.

    The first is never, since flipping all signs changes no absolute sum. The first choice flips none.
    """
    if pairs <= MAX_EXACT:
        rows = (np.arange(2 ** (pairs - 1))[:, None] >> np.arange(pairs - 1)) & 1 == 1
    else:
        rows = np.random.default_rng(0).integers(0, 2, (DRAWN, pairs - 1)) == 1
        rows[0] = False  # the observed signs count among the possible ones
    return np.pad(rows, ((0, 0), (1, 0)))


def sign_flip_interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Compute the interval of the sign-flip test.

    Hartigan, JASA 64:1303, 1969.

    The means of all 2^R - 1 non-empty subsets cut the line into 2^R pieces. Each holds the center of symmetry with the
    same probability. The interval leaves out equally many pieces at both ends. Below six pairs no 95 % interval exists:
    it is infinite.
    """
    values = np.asarray(differences, dtype=float)
    means = _subset_means(values)
    pieces = len(means) + 1
    left_out = math.floor((1 - LEVEL) / 2 * pieces + 1e-9)
    if left_out < 1:
        return -math.inf, math.inf
    means.sort()
    return float(means[left_out - 1]), float(means[-left_out])


def _subset_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of the flipped and of the other pairs, for each choice of the test."""
    flipped = _flipped(len(values))
    chosen = np.concatenate([flipped[flipped.any(1)], ~flipped])
    return (chosen * values).sum(1) / chosen.sum(1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's method. Scandinavian Journal of Statistics 6:65, 1979."""
    order = np.argsort(p)
    adjusted, highest = np.empty(len(p)), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def case_wilcoxon(differences: Sequence[float]) -> float:
    """Compute Wilcoxon's p over cases of these networks."""
    values = np.asarray(differences, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2 or not values.any():
        return 1.0
    return float(wilcoxon(values).pvalue)
