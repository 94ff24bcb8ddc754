"""Inference over paired runs: exact tests, exact intervals, and what they say about labels and steps saved.

The unit is the paired run: the same label subset and seed, with and without pretraining. Cases of one trained network
are not independent evidence about a method, because all share that run's luck; a test over them, with runs averaged or
not, finds effects where there are none (`simulation.py` shows how often).

R paired runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

#: Up to this many pairs all sign flips are enumerated; beyond it, this many are drawn.
MOST_EXACT, DRAWN = 16, 100_000
#: Labels count as saved while the loss against all of them is at most this much Dice.
MARGIN = 0.005


@dataclass(frozen=True)
class Effect:
    """A mean difference over paired runs.

    Attributes:
        mean: Of the R differences.
        low, high: Its interval; infinite where R is too small for one at this level.
        p: Two-sided, of the sign-flip test.
        pairs: R.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def effect(differences: Sequence[float], level: float = 0.95) -> Effect:
    """Mean, exact interval and exact two-sided p of R paired differences.

    Raises:
        ValueError: Without any difference, or with one that is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite differences of at least one pair, got {differences!r}")
    low, high = sign_flip_interval(values, level)
    return Effect(float(values.mean()), low, high, sign_flip_p(values), len(values))


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the mean under random signs: exact if each difference is symmetric about zero when nothing is
    gained. Enumerated up to ``MOST_EXACT`` pairs, otherwise drawn with a fixed seed. Fisher 1935."""
    return float(sign_flip_ps(np.asarray(differences, dtype=float)[None])[0])


def sign_flip_ps(studies: np.ndarray) -> np.ndarray:
    """``sign_flip_p`` of many studies at once: (S, R) -> (S,)."""
    pairs = studies.shape[1]
    # the first sign is left alone: a flip of all signs changes no absolute sum
    signs = np.ones((2 ** (pairs - 1), pairs)) if pairs <= MOST_EXACT else np.ones((DRAWN, pairs))
    if pairs <= MOST_EXACT:
        signs[:, 1:] = 1 - 2.0 * _bits(np.arange(2 ** (pairs - 1)), pairs - 1)
    else:
        signs[:, 1:] = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWN, pairs - 1))
        signs[0] = 1  # the observed signs are one of the possible ones
    result = np.empty(len(studies))
    for row, differences in enumerate(studies):
        sums = np.abs(signs @ differences)
        result[row] = np.mean(sums >= sums[0] * (1 - 1e-9) if sums[0] else np.ones(1))
    return result


def _bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """(N,) -> (N, width): the binary digits, the last first."""
    return (numbers[:, None] >> np.arange(width)) & 1


def sign_flip_interval(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that belongs to the sign-flip test: the mean's typical values (Hartigan, JASA 64:1303, 1969).

    The means of all 2^R - 1 non-empty subsets cut the line into 2^R pieces, each of which holds the centre of
    symmetry with the same chance; the interval leaves out the same number of pieces at both ends. Below six pairs no
    95 % interval exists and it is infinite.
    """
    values = np.asarray(differences, dtype=float)
    means = _subset_means(values)
    pieces = len(means) + 1
    left_out = math.floor((1 - level) / 2 * pieces + 1e-9)
    if left_out < 1:
        return -math.inf, math.inf
    means.sort()
    return float(means[left_out - 1]), float(means[-left_out])


def _subset_means(values: np.ndarray) -> np.ndarray:
    if len(values) <= MOST_EXACT:
        chosen = _bits(np.arange(1, 2 ** len(values)), len(values))
    else:
        chosen = np.random.default_rng(0).integers(0, 2, (DRAWN, len(values)))
        chosen = chosen[chosen.any(1)]
    return (chosen * values).sum(1) / chosen.sum(1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given (Scandinavian Journal of Statistics 6:65, 1979)."""
    order = np.argsort(p)
    adjusted, highest = np.empty(len(p)), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def case_wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided Wilcoxon signed-rank p over cases: whether *these* networks differ, which says nothing about others."""
    values = np.asarray(differences, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2 or not values.any():
        return 1.0
    return float(wilcoxon(values).pvalue)


@dataclass(frozen=True)
class LabelsSaved:
    """How many labels a method saves.

    Attributes:
        share: 1 - n / all; None if no budget below all was shown to suffice.
        labels: n, the smallest budget that was shown to suffice.
        everything: All labels.
    """

    share: float | None
    labels: int | None
    everything: int


def labels_saved(against_all: Mapping[int, Effect], everything: int, margin: float = MARGIN) -> LabelsSaved:
    """The smallest n whose arm is shown not to lose ``margin`` Dice against scratch with all labels.

    Args:
        against_all: Budget n -> the effect of arm(n) - scratch(all).
        everything: How many labels "all" is.
        margin: Dice that may be lost.
    """
    enough = [n for n in sorted(against_all) if n < everything and against_all[n].low > -margin]
    if not enough:
        return LabelsSaved(None, None, everything)
    return LabelsSaved(1 - enough[0] / everything, enough[0], everything)


def steps_to_reach(curve: Mapping[int, float], target: float) -> int | None:
    """The first snapshot whose Dice is at least ``target``; None if none is."""
    return next((step for step in sorted(curve) if curve[step] >= target), None)
