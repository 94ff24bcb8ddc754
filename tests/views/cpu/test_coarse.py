import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.views.cpu import coarse
from nnssl_ext.views.cpu.coarse import coarse_matrix, lower
from nnssl_ext.views.cpu.separable import along_axes

SHAPE = (20, 33, 70)


@pytest.mark.parametrize("together", [1, coarse.TOGETHER])
@pytest.mark.parametrize("size", [(20, 33, 70), (19, 17, 40), (20, 9, 70), (5, 33, 70), (20, 33, 1), (1, 1, 1)])
def test_is_nearest_sampling_and_trilinear_interpolation_in_place(
    size: tuple[int, int, int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse, "TOGETHER", together)
    volume = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(volume[None, None], size=size, mode="nearest-exact")
    expected = F.interpolate(small, size=SHAPE, mode="trilinear")[0, 0]
    by_matrices = along_axes(volume, [coarse_matrix(m, n) for m, n in zip(size, SHAPE, strict=True)])
    result = lower(volume, size)
    assert result.data_ptr() == volume.data_ptr()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_matrices, expected, rtol=1e-5, atol=1e-5)


def test_of_a_channel_of_a_batch() -> None:
    batch = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    lower(batch[1, 2], (10, 16, 35))
    assert not torch.equal(batch[1, 2], before[1, 2])
    batch[1, 2] = before[1, 2]
    assert torch.equal(batch, before)
