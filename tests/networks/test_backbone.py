import pydoc

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_ext.networks.backbone import UNetBackbone, backbone_of
from tests.datasets import architecture


def network(kind: str, channels: int = 1, outputs: int = 3) -> nn.Module:
    plan = architecture(kind)
    return get_network_from_plans(
        plan["network_class_name"],
        plan["arch_kwargs"],
        plan["_kw_requires_import"],
        channels,
        outputs,
        deep_supervision=True,
    )


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_features_have_the_strides_and_channels_it_names(kind: str) -> None:
    backbone = backbone_of(network(kind))
    size = (16, 24, 32)
    features = backbone.features(torch.randn(1, 1, *size))
    assert [f.shape[1] for f in features] == backbone.channels
    for feature, stride in zip(features, backbone.strides, strict=True):
        assert tuple(feature.shape[2:]) == tuple(n // s for n, s in zip(size, stride, strict=True))


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_the_first_stages_alone(kind: str) -> None:
    net, image = network(kind), torch.randn(1, 1, 16, 16, 16)
    backbone = backbone_of(net)
    whole = backbone.encoder(image)
    for expected, found in zip(whole, backbone.features(image), strict=True):
        assert torch.equal(expected, found)
    part = backbone.features(image, 2)
    assert len(part) == 2
    assert torch.equal(part[1], whole[1])
    backbone.train_encoder_only(2)
    part[1].sum().backward()
    named = dict(net.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == {n for n, p in named.items() if p.grad is not None}
    assert not any(p.requires_grad for n, p in named.items() if n.startswith(("decoder.", "encoder.stages.2")))
    assert any(p.requires_grad for n, p in named.items() if n.startswith("encoder.stages.1"))


def runs(backbone: UNetBackbone, size: tuple[int, int, int]) -> bool:
    try:
        outputs = backbone.network.train()(torch.randn(1, 1, *size))
    except (RuntimeError, ValueError):
        return False
    return tuple(outputs[0].shape[2:]) == size


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_a_crop_that_is_called_legal_runs_and_one_that_fails_is_called_illegal(kind: str) -> None:
    backbone = backbone_of(network(kind))
    for size in [(4, 4, 8), (8, 8, 8), (6, 8, 8), (12, 8, 16), (8, 9, 8), (2, 8, 8), (16, 20, 24), (1, 4, 4)]:
        if backbone.crop_problem(size):
            continue
        assert runs(backbone, size), size
    assert not runs(backbone, (8, 9, 8))
    assert "9 (axis 1" in backbone.crop_problem((8, 9, 8))


def test_residual_networks_need_two_voxels_at_the_bottleneck() -> None:
    """At once the total stride the pooled skip is broadcast without an error: refused although it may run."""
    problem = backbone_of(network("residual")).crop_problem((8, 4, 8))
    assert "at least 8" in problem
    assert "use 8" in problem
    assert not backbone_of(network("plain")).crop_problem((8, 4, 8))


def test_one_voxel_at_the_bottleneck_is_refused() -> None:
    backbone = backbone_of(network("plain"))
    assert "one voxel" in backbone.crop_problem((4, 4, 4))
    assert not runs(backbone, (4, 4, 4))


def test_deep_supervision_switch() -> None:
    backbone = backbone_of(network("plain"))
    backbone.set_deep_supervision(False)
    assert isinstance(backbone.network(torch.randn(1, 1, 8, 8, 8)), torch.Tensor)


def test_unknown_networks_are_refused_by_name() -> None:
    primus = pydoc.locate("dynamic_network_architectures.architectures.primus.Primus")
    assert primus is not None
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        backbone_of(nn.Linear(1, 1))
