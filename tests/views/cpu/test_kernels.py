import pytest
import torch

from nnssl_ext.views.cpu import kernels
from nnssl_ext.views.filters import blur, sharpen
from nnssl_ext.views.intensity import adjust_gamma


def volume(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (11, 20, 33), generator=torch.Generator().manual_seed(0))


def test_noise_is_normal_and_follows_its_seed() -> None:
    noise = [torch.zeros(50, 50, 51) for _ in range(3)]
    for values, seed in zip(noise, ([1, 0], [1, 0], [1, 1]), strict=True):
        kernels.add_noise(values, 2.0, seed)
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    values = noise[0].flatten() / 2
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert (values**4).mean().item() == pytest.approx(3, abs=0.1)
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (values.abs() < deviations).float().mean().item() == pytest.approx(share, abs=0.005)
    assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 0.01


@pytest.mark.parametrize("filtered", [1, 1000, kernels.FILTERED])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.8)])
@pytest.mark.parametrize("deviation", [(0.5, 0.7, 1.0), (0.0, 2.0, 0.3)])
def test_blur_is_the_definitions_in_any_number_of_steps(
    deviation: tuple[float, ...], spacing: tuple[float, ...], filtered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FILTERED", filtered)
    expected = blur(volume()[None], torch.tensor([deviation]), spacing)[0]
    found = volume()
    kernels.blur(found, deviation, spacing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_short_axis_is_filtered_too() -> None:
    for shape in ((1, 5, 6), (2, 1, 9)):
        expected = sharpen(volume(*shape)[None], torch.tensor([0.8]), (1.0, 1.0, 1.0))[0]
        found = volume(*shape)
        kernels.sharpen(found, 0.8, (1.0, 1.0, 1.0))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_gamma_keeps_statistics_of_intensities_far_from_zero(inverted: bool, offset: float) -> None:
    expected = adjust_gamma(
        volume()[None].double() + offset, torch.tensor([1.3]).double(), invert=inverted, retain_stats=True
    )[0]
    found = volume() + offset
    kernels.adjust_gamma(found, 1.3, invert=inverted, retain_stats=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5 + 1e-6 * offset)
