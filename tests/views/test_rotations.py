import numpy as np
import pytest

from nnssl_ext.views.rotations import cube_group, grid_rotations, published_rotations, rotatable_size, same_spacing


def test_the_groups_of_the_cube() -> None:
    group, published = cube_group(), published_rotations()
    assert len(group) == 24
    assert len({turn.tobytes() for turn in group}) == 24
    assert len(published) == 10
    for turn in group:
        np.testing.assert_array_equal(turn @ turn.T, np.eye(3))
        assert np.linalg.det(turn) == pytest.approx(1)
    assert np.array_equal(group[0], np.eye(3))
    assert np.array_equal(published[0], np.eye(3))


@pytest.mark.parametrize(
    ("spacing", "published", "cube"),
    [((1.0, 1.0, 1.0), 10, 24), ((5.0, 1.0, 1.0), 6, 8), ((1.0, 1.0, 3.0), 6, 8), ((3.0, 1.0, 2.0), 4, 4)],
)
def test_only_turns_that_map_the_grid_to_itself(spacing: tuple, published: int, cube: int) -> None:
    assert len(grid_rotations(published_rotations(), spacing)) == published
    assert len(grid_rotations(cube_group(), spacing)) == cube
    for turn in grid_rotations(cube_group(), spacing):
        np.testing.assert_allclose(np.abs(turn) @ np.asarray(spacing), spacing)


@pytest.mark.parametrize(
    ("size", "steps", "spacing", "expected"),
    [
        ((40, 64, 64), (8, 16, 16), (1, 1, 1), (32, 32, 32)),
        ((40, 56, 40), (8, 8, 8), (1, 1, 1), (40, 40, 40)),
        ((20, 256, 224), (4, 32, 32), (5, 0.6, 0.6), (20, 224, 224)),
        ((14, 32, 48), (1, 8, 16), (3, 1, 2), (14, 32, 48)),
        ((8, 24, 24), (4, 16, 16), (1, 1, 1), (32, 32, 32)),
    ],
)
def test_edges_are_equal_along_axes_that_are_exchanged(
    size: tuple, steps: tuple, spacing: tuple, expected: tuple
) -> None:
    assert rotatable_size(size, steps, same_spacing(spacing)) == expected
