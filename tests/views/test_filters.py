import math
from collections.abc import Callable

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnssl_ext.views.filters import (
    blur,
    gaussian_matrices,
    gaussian_taps,
    gibbs_ringing,
    lower_resolution,
    sharpen,
    simulate_thick_slices,
)

View = Callable[[Tensor, Tensor], Tensor]
ISOTROPIC = (1.0, 1.0, 1.0)


def volumes(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 12, 13, 14), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("view", "weak", "strong"),
    [
        (lambda v, s: blur(v, s[:, None].expand(-1, 3), ISOTROPIC), 0.0, 1.0),
        (lambda v, s: sharpen(v, s, ISOTROPIC), 0.0, 1.0),
        (lambda v, s: lower_resolution(v, s, ISOTROPIC), 1.0, 0.5),
        (gibbs_ringing, 2.0, 0.5),
    ],
)
def test_each_volume_has_its_own_strength(view: View, weak: float, strong: float) -> None:
    strength = torch.full((4,), weak)
    strength[1] = strong
    changed = view(volumes(), strength)
    torch.testing.assert_close(changed[1:2], view(volumes()[1:2], torch.tensor([strong])))
    assert not torch.allclose(changed[1], volumes()[1], atol=0.1)
    for n in (0, 2, 3):
        torch.testing.assert_close(changed[n], volumes()[n], rtol=0, atol=1e-5)


def test_blur_is_scipys() -> None:
    expected = gaussian_filter(volumes()[0].numpy(), (0.5, 1.0, 1.0), mode="nearest", truncate=3)
    # radii are rounded a little differently for the thick axis
    found = blur(volumes(), torch.ones(4, 3), (2.0, 1.0, 1.0))[0]
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=0.02, rtol=0)


@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.75, 0.9, 1.0])
def test_a_gaussian_has_nnunets_weights(deviation: float) -> None:
    from batchgeneratorsv2.transforms.noise.gaussian_blur import _build_kernel

    theirs = _build_kernel(deviation, truncate=6)
    taps = gaussian_taps(deviation, 64)
    assert len(theirs) == 2 * len(taps) - 1
    torch.testing.assert_close(torch.tensor(taps), theirs[len(taps) - 1 :])


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_matrices_are_the_taps_with_replicated_edges(length: int) -> None:
    deviations = [0.0, 0.5, 2.0]
    for matrix, deviation in zip(gaussian_matrices(torch.tensor(deviations), length), deviations, strict=True):
        expected = torch.zeros(length, length)
        for row in range(length):
            for k, weight in enumerate(gaussian_taps(deviation, length)):
                for place in {row - k, row + k}:
                    expected[row, min(max(place, 0), length - 1)] += weight
        torch.testing.assert_close(matrix, expected)
        assert math.isclose(matrix.sum(), length, rel_tol=1e-5)


def test_sharpening_undoes_some_blur() -> None:
    original = blur(volumes(1, 16, 16, 16), torch.full((1, 3), 1.5), ISOTROPIC)
    soft = blur(original.clone(), torch.ones(1, 3), ISOTROPIC)
    sharp = sharpen(soft.clone(), torch.ones(1), ISOTROPIC)
    assert (sharp - original).norm() < (soft - original).norm()


@pytest.mark.parametrize("zoom", [0.5, 0.6, 0.9])
def test_lower_resolution_is_nnunets(zoom: float) -> None:
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

    volume = volumes(2, 11, 36, 40)
    theirs = SimulateLowResolutionTransform(zoom, False, True, None)
    expected = theirs(image=volume.clone())["image"]
    torch.testing.assert_close(lower_resolution(volume, torch.full((2,), zoom), ISOTROPIC), expected)


def test_a_thick_axis_keeps_its_resolution() -> None:
    along_thick = torch.tensor([0.0, 1.0]).repeat(8)[:, None, None].expand(1, 16, 16, 16).clone()
    low = lower_resolution(along_thick.clone(), torch.tensor([0.5]), (4.0, 1.0, 1.0))
    torch.testing.assert_close(low, along_thick)


def test_ringing_removes_high_frequencies_and_overshoots_at_edges() -> None:
    step = torch.zeros(1, 8, 8, 32)
    step[..., 8:24] = 1
    rung = gibbs_ringing(step.clone(), torch.tensor([0.4]))
    assert rung.max() > 1.05
    assert rung.min() < -0.05
    torch.testing.assert_close(rung.mean(), step.mean())
    torch.testing.assert_close(gibbs_ringing(step.clone(), torch.tensor([2.0])), step, atol=1e-5, rtol=0)


def test_one_axis_of_a_sample_becomes_thick() -> None:
    batch = torch.randn(3, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    simulate_thick_slices(batch, torch.tensor([0, 2, 1]), torch.tensor([0.5, 1.0, 0.25]))
    assert torch.equal(batch[1], before[1])
    for sample, axis in ((0, 0), (2, 1)):
        rough = [batch[sample].diff(dim=a).abs().mean().item() for a in (1, 2, 3)]
        assert rough[axis] < 0.7 * min(r for a, r in enumerate(rough) if a != axis)
