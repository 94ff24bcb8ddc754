import pytest
import torch

from nnssl_ext.losses.vicreg import vicreg


def published(first: torch.Tensor, second: torch.Tensor) -> float:
    """Bardes et al. 2022, equation 6: 25 s(Z, Z') + 25 [v(Z) + v(Z')] + c(Z) + c(Z')."""
    loss = 25 * ((first - second) ** 2).mean().item()
    for branch in (first, second):
        covariance = branch.T.cov()
        loss += 25 * (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean().item()
        loss += (covariance - covariance.diagonal().diag()).square().sum().item() / len(covariance)
    return loss


@pytest.mark.parametrize("scale", [0.3, 3.0])  # the variance has the larger share, or none at all
def test_variance_and_covariance_are_summed_over_both_views(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = scale * torch.randn(8, 8, generator=generator) / 8**0.5
    first = torch.randn(4000, 8, generator=generator) @ mixing
    second = first[torch.randperm(4000, generator=generator)]
    loss = vicreg(first, second, torch.cat([first, second])).mean().item()
    assert loss == pytest.approx(published(first, second), rel=1e-3)
