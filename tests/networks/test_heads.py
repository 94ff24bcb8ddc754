import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.methods.rotation import SpacingClassifier, roughness
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.networks.context import ConvolutionalContext, RecurrentContext
from nnssl_ext.networks.heads import GridHead, VoxelHead, grid_features
from tests.support.networks import network


def mean_cosine(features: Tensor) -> float:
    """Mean cosine of different samples' features (N, F)."""
    unit = F.normalize(features, dim=1)
    number = len(unit)
    return (((unit @ unit.T).sum() - number) / (number * (number - 1))).item()


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_octants_tell_images_apart_where_a_global_average_does_not(kind: str) -> None:
    """An instance norm has just made all channel means alike, so right after it a global average hides the image."""
    torch.manual_seed(0)
    coarse = torch.randn(8, 1, 4, 4, 4)
    images = F.interpolate(coarse, size=(16, 16, 16), mode="trilinear")
    with torch.no_grad():
        features = backbone_of(network(kind)).features(images)[-1]
    assert mean_cosine(features.mean((2, 3, 4))) > 0.97
    assert mean_cosine(grid_features(features)) < 0.9
    # a layer at every voxel alone is no remedy
    head = VoxelHead(channels=features.shape[1], hidden=64, outputs=5)
    with torch.no_grad():
        assert mean_cosine(head.voxel(features).mean((2, 3, 4))) > 0.97
        assert mean_cosine(head(features)[1]) < 0.9


def test_octants_of_two_voxels_are_the_voxels() -> None:
    features = torch.randn(3, 5, 2, 2, 2)
    assert torch.equal(grid_features(features), features.flatten(1))
    assert grid_features(torch.randn(3, 5, 1, 3, 4)).shape == (3, 40)


def test_a_head_has_the_layers_it_is_asked_for() -> None:
    head = GridHead(channels=3, hidden=[7, 6], outputs=4)
    assert [layer.out_features for layer in head if isinstance(layer, torch.nn.Linear)] == [7, 6, 4]
    assert head(torch.randn(2, 24)).shape == (2, 4)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", [RecurrentContext, ConvolutionalContext])
def test_contexts_see_every_row(kind: type, number: int) -> None:
    shape = {"rows": number, "columns": 4} if kind is ConvolutionalContext else {}
    context = kind(**shape, embedding_dim=5, context_dim=6)
    rows = torch.randn(2, number, 4, 5, requires_grad=True)
    summary = context(rows)
    assert summary.shape == (2, 6)
    (gradient,) = torch.autograd.grad(summary.sum(), rows)
    assert (gradient.abs().sum(-1) > 0).all()


def test_roughness_sees_the_grid_and_nothing_else() -> None:
    image = torch.randn(2, 1, 12, 12, 12)
    thick = image.clone()
    thick[:, :, 1::2] = thick[:, :, ::2]  # two slices each are one
    assert roughness(image).abs().max() < 0.1
    assert (roughness(thick)[:, 0] < -0.4).all()
    torch.testing.assert_close(roughness(5 * image + 3), roughness(image), atol=1e-4, rtol=0)
    image.requires_grad_()
    assert SpacingClassifier(classes=3)(image).shape == (2, 3)
    probe = SpacingClassifier(classes=3)
    probe(image).sum().backward()
    assert image.grad is None
    assert all(p.grad is not None for p in probe.parameters())
