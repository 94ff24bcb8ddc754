from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnssl_ext.views.intensity import (
    add_noise,
    adjust_gamma,
    invert,
    remap_percentiles,
    scale_brightness,
    scale_contrast,
    shift_histogram,
)

View = Callable[[Tensor, Tensor], Tensor]


def volumes() -> Tensor:
    return torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("view", [scale_brightness, scale_contrast, adjust_gamma])
def test_each_volume_has_its_own_strength(view: View) -> None:
    changed = view(volumes(), torch.tensor([1.0, 1.5, 0.8]))
    torch.testing.assert_close(changed[0], volumes()[0])
    for n, strength in ((1, 1.5), (2, 0.8)):
        torch.testing.assert_close(changed[n : n + 1], view(volumes()[n : n + 1], torch.tensor([strength])))
        assert not torch.allclose(changed[n], volumes()[n])


def test_brightness_scales() -> None:
    torch.testing.assert_close(scale_brightness(volumes(), torch.full((3,), 1.25)), volumes() * 1.25)


@pytest.mark.parametrize("view", [adjust_gamma, scale_contrast, lambda v, s: adjust_gamma(v, s, invert=True)])
def test_gamma_and_contrast_keep_the_range_and_the_order(view: View) -> None:
    before = volumes()
    changed = view(before.clone(), torch.full((3,), 0.7))
    assert changed.amax() <= before.amax() + 1e-5
    assert changed.amin() >= before.amin() - 1e-5
    order = before[0].flatten().argsort()
    assert (changed[0].flatten()[order].diff() >= -1e-5).all()


def test_gamma_formula() -> None:
    ramp = torch.linspace(0, 4, 5).reshape(1, 1, 1, 5)
    torch.testing.assert_close(adjust_gamma(ramp.clone(), torch.tensor([2.0])), 4 * (ramp / 4) ** 2)
    inverted = adjust_gamma(ramp.clone(), torch.tensor([2.0]), invert=True)
    torch.testing.assert_close(inverted, 4 - 4 * ((4 - ramp) / 4) ** 2)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_nnunets_and_keeps_the_statistics(inverted: bool) -> None:
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform

    theirs = GammaTransform(
        gamma=1.4, p_invert_image=int(inverted), synchronize_channels=False, p_per_channel=1, p_retain_stats=1
    )
    expected = theirs(image=volumes())["image"]
    changed = adjust_gamma(volumes(), torch.full((3,), 1.4), invert=inverted, retain_stats=True)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(changed, (1, 2, 3)), moment(volumes(), (1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_contrast_is_nnunets() -> None:
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform

    theirs = ContrastTransform(1.2, preserve_range=True, synchronize_channels=False)
    torch.testing.assert_close(scale_contrast(volumes(), torch.full((3,), 1.2)), theirs(image=volumes())["image"])


def test_noise_has_its_deviation_and_follows_its_seed() -> None:
    zeros = torch.zeros(4, 20, 20, 20)
    changed = add_noise(zeros.clone(), torch.tensor([0.0, 0.3, 0.3, 0.1]), [3, 4, 4, 5])
    assert not changed[0].any()
    assert changed[1].std().item() == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(changed[1], changed[2])
    assert torch.equal(add_noise(zeros[:1].clone(), torch.tensor([0.1]), [5])[0], changed[3])
    assert torch.equal(add_noise(zeros[:2].clone(), torch.tensor([0.3, 0.3]), [4, 4]), changed[1:3])


def test_inversion_is_its_own_inverse() -> None:
    once = invert(volumes())
    assert not torch.equal(once, volumes())
    torch.testing.assert_close(invert(once.clone()), volumes())


def test_histogram_shift_keeps_order_and_range() -> None:
    curve = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).sort().values
    curve[:, 0], curve[:, -1] = 0, 1
    before, changed = volumes(), shift_histogram(volumes(), curve)
    for n in range(3):
        order = before[n].flatten().argsort()
        assert (changed[n].flatten()[order].diff() >= -1e-5).all()
    torch.testing.assert_close(changed.amax((1, 2, 3)), before.amax((1, 2, 3)))
    torch.testing.assert_close(changed.amin((1, 2, 3)), before.amin((1, 2, 3)))
    straight = torch.linspace(0, 1, 6).expand(3, 6)
    torch.testing.assert_close(shift_histogram(volumes(), straight), before)


def test_percentiles_are_mapped_to_zero_and_one() -> None:
    changed = remap_percentiles(volumes()[:, None])
    assert changed.amin() == 0
    assert changed.amax() == 1
    assert torch.isfinite(remap_percentiles(torch.ones(1, 1, 4, 4, 4))).all()


def test_the_percentiles_see_all_columns() -> None:
    """Every second voxel of rows of even length would be those of every second column."""
    batch = torch.randn(1, 1, 40, 50, 100, generator=torch.Generator().manual_seed(0))
    batch[..., 1::2] += 50
    changed = remap_percentiles(batch)
    assert 0.1 < changed[..., 1::2].median() < 0.999
