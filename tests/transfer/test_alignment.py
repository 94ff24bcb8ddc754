"""Stages correspond by what a voxel of theirs covers, not by their number."""

import pytest

from nnssl_ext.transfer.alignment import align, align_by_index, resolutions

ISOTROPIC = [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)]


def aligned(source: tuple, target: tuple) -> list[int | None]:
    (source_spacing, source_strides), (spacing, strides) = source, target
    sizes = dict(enumerate(resolutions(source_spacing, source_strides)))
    return list(align(sizes, dict(enumerate(resolutions(spacing, strides)))).values())


def test_resolution_is_spacing_times_cumulative_stride() -> None:
    assert resolutions((3.0, 0.5, 0.5), [(1, 1, 1), (1, 2, 2), (2, 2, 2)]) == [(3, 0.5, 0.5), (3, 1, 1), (6, 2, 2)]


@pytest.mark.parametrize(
    ("spacing", "strides", "expected"),
    [
        ((1, 1, 1), ISOTROPIC, [0, 1, 2, 3, 4]),
        ((1.3, 1.3, 1.3), ISOTROPIC, [0, 1, 2, 3, 4]),
        # twice as coarse: one stage on; the coarsest has no counterpart
        ((2, 2, 2), ISOTROPIC, [1, 2, 3, 4, None]),
        # twice as fine: the finest has none
        ((0.5, 0.5, 0.5), ISOTROPIC, [None, 0, 1, 2, 3]),
        ((1, 1, 1), [*ISOTROPIC, (2, 2, 2)], [0, 1, 2, 3, 4, None]),
        ((1, 1, 1), ISOTROPIC[:3], [0, 1, 2]),
        # a thick axis does not decide
        ((5, 1, 1), [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)], [0, 1, 2, 3]),
        ((12, 1, 1), [(1, 1, 1), (1, 2, 2), (1, 2, 2)], [0, 1, 2]),
        ((4, 2, 2), [(1, 1, 1), (1, 2, 2), (2, 2, 2)], [1, 2, 3]),
        # strides of four: every other stage of the source
        ((1, 1, 1), [(1, 1, 1), (4, 4, 4), (4, 4, 4)], [0, 2, 4]),
        ((64, 64, 64), ISOTROPIC[:2], [None, None]),
    ],
)
def test_stages_of_like_resolution(spacing: tuple, strides: list, expected: list[int | None]) -> None:
    assert aligned(((1, 1, 1), ISOTROPIC), (spacing, strides)) == expected


def test_order_is_kept_and_no_stage_is_used_twice() -> None:
    crowded = [(1, 1, 1), (1, 1, 1), (1, 1, 1)]
    found = [stage for stage in aligned(((1, 1, 1), ISOTROPIC), ((1, 1, 1), crowded)) if stage is not None]
    assert found == sorted(set(found)) != []


def test_stages_that_a_source_lacks() -> None:
    assert align({1: (1, 1, 1), 2: (2, 2, 2)}, {0: (1, 1, 1), 1: (2, 2, 2)}) == {0: 1, 1: 2}
    assert align_by_index([1, 2], [0, 1, 2]) == {0: None, 1: 1, 2: 2}
