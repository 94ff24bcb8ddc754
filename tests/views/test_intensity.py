import pytest
import torch

from nnssl_ext.views.intensity import (
    add_noise,
    adjust_gamma,
    invert,
    remap_percentiles,
    scale_brightness,
    stretch_contrast,
)
from nnssl_ext.views.random import VIEWS, BatchRandom

CPU = torch.device("cpu")


def batch() -> torch.Tensor:
    return torch.randn(3, 2, 5, 6, 7, generator=torch.Generator().manual_seed(1))


def random() -> BatchRandom:
    return BatchRandom(0, VIEWS, [4, 5, 6], CPU)


def test_a_view_touches_only_the_samples_and_channels_it_was_drawn_for() -> None:
    factor = torch.ones(3, 2)
    factor[1, 0] = 1.5
    for view in (scale_brightness, stretch_contrast, adjust_gamma):
        changed = view(batch(), factor) != batch()
        assert changed[1, 0].any()
        changed[1, 0] = False
        assert not changed.any()


def test_brightness_scales() -> None:
    torch.testing.assert_close(scale_brightness(batch(), torch.full((3, 2), 1.25)), batch() * 1.25)


def test_gamma_and_contrast_keep_the_range_and_the_order() -> None:
    for view in (adjust_gamma, stretch_contrast):
        volume, value = batch(), torch.full((3, 2), 0.7)
        changed = view(volume.clone(), value)
        assert changed.amax() <= volume.amax() + 1e-5
        assert changed.amin() >= volume.amin() - 1e-5
        order = volume[0, 0].flatten().argsort()
        assert (changed[0, 0].flatten()[order].diff() >= -1e-5).all()


def test_gamma_formula() -> None:
    volume = torch.linspace(0, 4, 5).reshape(1, 1, 1, 1, 5)
    changed = adjust_gamma(volume.clone(), torch.tensor([[2.0]]))
    torch.testing.assert_close(changed, 4 * (volume / 4) ** 2)


def test_noise_has_its_deviation_and_follows_its_sample() -> None:
    volume = torch.zeros(3, 1, 20, 20, 20)
    changed = add_noise(volume.clone(), torch.tensor([0.0, 0.3, 0.3]), random())
    assert not changed[0].any()
    assert changed[1].std().item() == pytest.approx(0.3, rel=0.05)
    alone = add_noise(volume[:1].clone(), torch.tensor([0.3]), BatchRandom(0, VIEWS, [5], CPU))
    assert torch.equal(alone[0], changed[1])


def test_inversion_is_its_own_inverse() -> None:
    chosen = torch.tensor([True, False, True])
    once = invert(batch(), chosen)
    assert torch.equal(once[1], batch()[1])
    assert not torch.equal(once[0], batch()[0])
    torch.testing.assert_close(invert(once.clone(), chosen), batch())


def test_percentiles_are_mapped_to_zero_and_one() -> None:
    changed = remap_percentiles(batch())
    assert changed.amin() == 0
    assert changed.amax() == 1
    assert torch.isfinite(remap_percentiles(torch.ones(1, 1, 4, 4, 4))).all()
