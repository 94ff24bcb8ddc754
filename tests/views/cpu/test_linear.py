import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.views.cpu import linear
from nnssl_ext.views.cpu.linear import interpolate
from nnssl_ext.views.filters import Taps, coarse_taps

SHAPE = (20, 33, 70)


@pytest.mark.parametrize("together", [1, linear.TOGETHER])
@pytest.mark.parametrize("size", [(20, 33, 70), (19, 17, 40), (20, 9, 70), (5, 33, 70), (20, 33, 1), (1, 1, 1)])
def test_low_resolution_is_nearest_sampling_and_trilinear_interpolation_in_place(
    size: tuple[int, int, int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TOGETHER", together)
    batch = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    before, volume = batch.clone(), batch[1, 2]
    small = F.interpolate(volume[None, None], size=size, mode="nearest-exact")
    expected = F.interpolate(small, size=SHAPE, mode="trilinear")[0, 0]
    taps = [None if m == n else coarse_taps(m, n) for m, n in zip(size, SHAPE, strict=True)]
    result = interpolate(volume, taps, volume)
    assert result.data_ptr() == volume.data_ptr()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    batch[1, 2] = before[1, 2]
    assert torch.equal(batch, before)


@pytest.mark.parametrize("together", [1, linear.TOGETHER])
@pytest.mark.parametrize("mirrored", [False, True])
def test_enlarging_is_torchs_trilinear_interpolation(
    mirrored: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TOGETHER", together)
    volume = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    size = [2 * n + 1 for n in SHAPE]
    expected = F.interpolate(volume[None, None], size=size, mode="trilinear")[0, 0]
    taps = []
    for n, length in zip(size, SHAPE, strict=True):
        place = ((torch.arange(n).double() + 0.5) * length / n - 0.5).clamp(0, length - 1)
        place = place.flip(0) if mirrored else place
        below = place.long().clamp_max(length - 2)
        taps.append(Taps(below, below + 1, (place - below).float()))
    expected = expected.flip(0, 1, 2) if mirrored else expected
    torch.testing.assert_close(interpolate(volume, taps, torch.empty(size)), expected, rtol=0, atol=5e-5)
