"""2-D images as volumes."""

import torch

from nnssl_ext.views.depth import colors_as_depth, drifting, luminance, repeated
from nnssl_ext.views.random import BatchRandom

CPU = torch.device("cpu")


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 255


def draws(batch: int = 3) -> BatchRandom:
    return BatchRandom(0, 0, list(range(batch)), CPU)


def test_colours_are_slices_in_some_order() -> None:
    pixels = images(8)
    volume = colors_as_depth(pixels, draws(8))
    assert volume.shape == (8, 1, 3, 12, 20)
    assert torch.equal(volume[:, 0].sort(1).values, pixels.sort(1).values)
    assert not torch.equal(volume[:, 0], pixels)


def test_repeat_is_the_grey_image() -> None:
    pixels = images()
    volume = repeated(pixels, 5)
    assert volume.shape == (3, 1, 5, 12, 20)
    assert (volume == volume[:, :, :1]).all()
    assert torch.allclose(luminance(pixels[:, :1].expand(-1, 3, -1, -1)), pixels[:, :1], rtol=1e-5)


def test_drift_at_zero_strength_repeats() -> None:
    assert torch.allclose(drifting(images(), draws(), 4, 0.0, 0.0, 0.0), repeated(images(), 4), atol=1e-2)


def test_drift_is_slow_and_moves() -> None:
    smooth = torch.nn.functional.interpolate(images(), (48, 48), mode="bicubic")
    volume = drifting(smooth, draws(), 9, 20.0, 0.1, 0.1)
    near = (volume[:, :, 1:] - volume[:, :, :-1]).abs().mean((1, 2, 3, 4))
    far = (volume[:, :, -1] - volume[:, :, 0]).abs().mean((1, 2, 3))
    assert (far > 2 * near).all()
    assert (near > 0).all()
    # a shift along the rows alone moves nothing sideways
    ramp = torch.arange(20.0).view(1, 1, 1, 20).expand(1, 3, 12, 20)
    turned = drifting(ramp, draws(1), 3, 0.0, 0.2, 0.0)[0, 0]
    assert torch.allclose(turned[:, 5, 6:14].diff(dim=-1), torch.ones(3, 7), atol=1e-4)
