from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnssl_ext.views.filters import (
    blur,
    gibbs_ringing,
    lower_resolution,
    sharpen,
    shift_histogram,
    simulate_thick_slices,
)

View = Callable[[Tensor, Tensor], Tensor]
ISOTROPIC = (1.0, 1.0, 1.0)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 2, 12, 13, 14), generator=torch.Generator().manual_seed(2))


def only(neutral: float, value: float) -> Tensor:
    """A strength for the second channel of the first sample alone."""
    strength = torch.full((2, 2), neutral)
    strength[0, 1] = value
    return strength


@pytest.mark.parametrize(
    ("view", "neutral", "value"),
    [
        (lambda b, s: blur(b, s, ISOTROPIC), 0.0, 1.0),
        (lambda b, s: sharpen(b, s, ISOTROPIC), 0.0, 1.0),
        (lambda b, s: lower_resolution(b, s, ISOTROPIC), 1.0, 0.5),
        (gibbs_ringing, 0.0, 0.5),
        (lambda b, s: shift_histogram(b, torch.rand(2, 2, 5), s.bool()), 0.0, 1.0),
    ],
)
def test_only_what_was_drawn_is_touched(view: View, neutral: float, value: float) -> None:
    assert torch.equal(view(batch(), torch.full((2, 2), neutral)), batch())
    changed = view(batch(), only(neutral, value)) != batch()
    assert changed[0, 1].float().mean() > 0.5
    changed[0, 1] = False
    assert not changed.any()


def test_blur_is_scipys() -> None:
    expected = gaussian_filter(batch()[0, 1].numpy(), (0.5, 1.0, 1.0), mode="nearest", truncate=3)
    # radii are rounded a little differently for the thick axis
    torch.testing.assert_close(
        blur(batch(), only(0, 1.0), (2.0, 1.0, 1.0))[0, 1], torch.from_numpy(expected), atol=0.02, rtol=0
    )


def test_sharpening_undoes_some_blur() -> None:
    original = blur(batch(1, 1, 16, 16, 16), torch.tensor([[1.5]]), ISOTROPIC)
    soft = blur(original.clone(), torch.tensor([[1.0]]), ISOTROPIC)
    sharp = sharpen(soft.clone(), torch.tensor([[1.0]]), ISOTROPIC)
    assert (sharp - original).norm() < (soft - original).norm()


def test_lower_resolution_is_nearest_sampling_and_trilinear_interpolation() -> None:
    volume = torch.randn(1, 1, 11, 36, 40, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(volume, size=(7, 22, 24), mode="nearest-exact")
    expected = F.interpolate(small, size=volume.shape[2:], mode="trilinear")
    torch.testing.assert_close(lower_resolution(volume, torch.tensor([[0.6]]), ISOTROPIC), expected)


def test_lower_resolution_keeps_a_ramp_and_loses_detail() -> None:
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16, 16).clone()
    low = lower_resolution(ramp.clone(), torch.tensor([[0.5]]), ISOTROPIC)
    assert (low - ramp).abs().max() < 0.1
    noise = batch(1, 1, 16, 16, 16)
    assert (
        lower_resolution(noise.clone(), torch.tensor([[0.5]]), ISOTROPIC).diff(dim=4).std()
        < 0.6 * noise.diff(dim=4).std()
    )


def test_a_thick_axis_keeps_its_resolution() -> None:
    along_thick = torch.tensor([0.0, 1.0]).repeat(8)[:, None, None].expand(1, 1, 16, 16, 16).clone()
    low = lower_resolution(along_thick.clone(), torch.tensor([[0.5]]), (4.0, 1.0, 1.0))
    torch.testing.assert_close(low, along_thick)


def test_ringing_removes_high_frequencies_and_overshoots_at_edges() -> None:
    step = torch.zeros(1, 1, 8, 8, 32)
    step[..., 8:24] = 1
    rung = gibbs_ringing(step.clone(), torch.tensor([[0.4]]))
    assert rung.max() > 1.05
    assert rung.min() < -0.05
    torch.testing.assert_close(rung.mean(), step.mean())
    torch.testing.assert_close(gibbs_ringing(step.clone(), torch.tensor([[2.0]])), step, atol=1e-5, rtol=0)


def test_histogram_shift_keeps_order_and_range() -> None:
    volume = batch(1, 1, 10, 10, 10)
    bent = shift_histogram(volume.clone(), torch.rand(1, 1, 6), torch.tensor([[True]]))
    order = volume.flatten().argsort()
    assert (bent.flatten()[order].diff() >= -1e-5).all()
    torch.testing.assert_close(bent.amax(), volume.amax())
    torch.testing.assert_close(bent.amin(), volume.amin())
    straight = torch.linspace(0, 1, 6).expand(1, 1, 6)
    torch.testing.assert_close(shift_histogram(volume.clone(), straight, torch.tensor([[True]])), volume)


def test_one_axis_of_a_sample_becomes_thick() -> None:
    batch = torch.randn(3, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    simulate_thick_slices(batch, torch.tensor([0, 2, 1]), torch.tensor([0.5, 1.0, 0.25]))
    assert torch.equal(batch[1], before[1])
    for sample, axis in ((0, 0), (2, 1)):
        rough = [batch[sample].diff(dim=a).abs().mean().item() for a in (1, 2, 3)]
        assert rough[axis] < 0.7 * min(r for a, r in enumerate(rough) if a != axis)
