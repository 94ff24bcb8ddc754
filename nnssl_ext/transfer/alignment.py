"""Match stages of source and target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

#: Cost of a target's stage without a source: that of a match one octave (a factor of two) off.
UNMATCHED = 1.0


def resolutions(spacing: Sequence[float], strides: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """Compute each stage's millimeters per voxel and axis."""
    result: list[tuple[float, ...]] = []
    current = tuple(float(edge) for edge in spacing)
    for stride in strides:
        current = tuple(edge * step for edge, step in zip(current, stride, strict=True))
        result.append(current)
    return result


def align(source: Mapping[int, Sequence[float]], target: Mapping[int, Sequence[float]]) -> dict[int, int | None]:
    """Match each target stage with the source stage of nearest resolution.

    Of all matchings that keep the order and use no stage twice, the one with the least sum of distances is taken. A
    distance is the median over the axes, in octaves, so that one thick axis does not decide. Equal medians are told
    apart by the mean. A stage without a partner costs one octave.

    Args:
        source, target: Stage number -> millimeters per voxel, per axis.
    """
    rows, columns = sorted(target), sorted(source)
    # best[i][j]: least cost of the target's first i stages with the source's first j, and the matches made
    best: list[list[tuple[float, float, tuple]]] = [[(0.0, 0.0, ())] * (len(columns) + 1)]
    for row in rows:
        above = best[-1]
        line = [(above[0][0] + UNMATCHED, above[0][1], (*above[0][2], None))]
        for j, column in enumerate(columns):
            octaves = [abs(math.log2(a / b)) for a, b in zip(target[row], source[column], strict=True)]
            cost, second, matches = above[j]
            matched = (cost + median(octaves), second + mean(octaves), (*matches, column))
            cost, second, matches = above[j + 1]
            unmatched = (cost + UNMATCHED, second, (*matches, None))
            line.append(min(matched, line[j], unmatched, key=_cost))
        best.append(line)
    return dict(zip(rows, best[-1][-1][2], strict=True))


def align_by_index(source: Sequence[int], target: Sequence[int]) -> dict[int, int | None]:
    """Match stages of the same number."""
    return {stage: stage if stage in source else None for stage in target}


def _cost(candidate: tuple[float, float, tuple]) -> tuple[float, float]:
    # rounded: equal distances must not be told apart by the last bits of a logarithm
    return round(candidate[0], 6), round(candidate[1], 6)
