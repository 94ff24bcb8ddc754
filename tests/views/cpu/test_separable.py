import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.views.cpu import separable
from nnssl_ext.views.cpu.separable import PLANES, TILE, along_axes, bands

LONG = 2 * TILE + 3


@pytest.fixture(autouse=True)
def _several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separable, "VOXELS", 1)


def volume() -> torch.Tensor:
    return torch.randn(2 * PLANES + 1, LONG, 7, generator=torch.Generator().manual_seed(0))


def test_each_axis_is_multiplied_by_its_matrix() -> None:
    a, b, c = (
        torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        for m, n in ((4, 2 * PLANES + 1), (TILE + 1, LONG), (9, 7))
    )
    expected = torch.einsum("id,jh,kw,dhw->ijk", a, b, c, volume())
    torch.testing.assert_close(along_axes(volume(), [a, b, c]), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(along_axes(volume(), [None, b, None]), b @ volume(), rtol=1e-4, atol=1e-3)
    assert torch.equal(along_axes(volume(), [None] * 3), volume())


@pytest.mark.parametrize("axis", range(3))
def test_a_banded_matrix_is_multiplied_in_tiles(axis: int) -> None:
    moved = volume().transpose(1, axis)
    shift = torch.eye(LONG).roll(1, 0)
    matrices: list[torch.Tensor | None] = [None, None, None]
    matrices[axis] = shift
    assert torch.equal(along_axes(moved, matrices), moved.roll(1, axis))


def test_a_row_of_zeros_gives_zeros() -> None:
    matrix = torch.zeros(2 * TILE, 7)
    matrix[0, 3] = 2
    result = along_axes(volume(), [None, None, matrix])
    assert torch.equal(result[..., 0], 2 * volume()[..., 3])
    assert not result[..., 1:].any()


def test_enlarging_is_torchs_trilinear_interpolation() -> None:
    matrices = [F.interpolate(torch.eye(n)[None], size=2 * n + 1, mode="linear")[0].T for n in volume().shape]
    expected = F.interpolate(volume()[None, None], size=[2 * n + 1 for n in volume().shape], mode="trilinear")[0, 0]
    torch.testing.assert_close(along_axes(volume(), matrices), expected)


@pytest.mark.parametrize("shift", [1, -1, PLANES, -PLANES - 2])
def test_the_result_may_take_the_place_of_the_volume(shift: int) -> None:
    depth = len(volume())
    generator = torch.Generator().manual_seed(1)
    matrices: list[torch.Tensor | None] = [
        torch.eye(depth).roll(shift, 0),
        torch.randn(LONG, LONG, generator=generator),
    ]
    for others in ([matrices[1], None], [None, None]):
        expected, inplace = along_axes(volume(), [matrices[0], *others]), volume()
        assert along_axes(inplace, [matrices[0], *others], out=inplace) is inplace
        assert torch.equal(inplace, expected)
        torch.testing.assert_close(expected, along_axes(volume().roll(shift, 0), [None, *others]))


@pytest.mark.parametrize("length", [2 * TILE, 3 * TILE // 2, TILE + 7, 2 * TILE + 3, 5])
@pytest.mark.parametrize("reach", [0, 2, 9])
def test_rows_of_any_number_are_multiplied_in_tiles(length: int, reach: int) -> None:
    generator = torch.Generator().manual_seed(length)
    planes = torch.randn(2 * PLANES + 1, length, 6, generator=generator)
    matrix = torch.randn(length, length, generator=generator).triu(-reach).tril(reach)
    result = along_axes(planes, [None, matrix, None])
    torch.testing.assert_close(result, matrix @ planes, rtol=1e-4, atol=1e-4)
    # whole planes in one go, and a plane's last rows never reach those of the next
    torch.testing.assert_close(along_axes(planes[3:4], [None, matrix, None]), result[3:4])


def test_bands_leave_most_zeros_out() -> None:
    matrix = torch.randn(4 * TILE, 4 * TILE).triu(-2).tril(2)
    split = bands(matrix)
    assert split.stack.shape == (4, TILE, TILE + 4)
    assert max(values.numel() for _, _, values in split.parts) == TILE * (TILE + 4)
