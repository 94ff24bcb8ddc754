import pytest
import torch

from nnssl_ext.losses.reconstruction import explained_variance, squared_error

SHAPE = (1, 2, 4, 5, 6)


def explained(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> float:
    return explained_variance(squared_error(prediction, target, weight), target, weight).item()


def test_the_mean_explains_nothing_and_the_target_everything() -> None:
    target, weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.ones(SHAPE)
    assert explained(target, target, weight) == 1
    assert explained(target.mean((2, 3, 4), keepdim=True), target, weight) == pytest.approx(0, abs=1e-6)


def test_nothing_is_explained_where_no_voxel_counts() -> None:
    target = torch.randn(SHAPE)
    assert torch.tensor(explained(target + 5, target, torch.zeros(SHAPE))).isnan()


@pytest.mark.parametrize(("deviation", "counts"), [(0.0, False), (0.01, False), (0.2, True)])
def test_a_nearly_constant_image_is_left_out(deviation: float, counts: bool) -> None:
    """An error of 0.1 is hundreds of times its variance, and would outweigh all other images of a mean."""
    target = deviation * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.tensor(explained(target + 0.1, target, torch.ones(SHAPE))).isfinite() == counts
