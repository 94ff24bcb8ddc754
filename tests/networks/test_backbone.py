from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.networks.backbone import Backbone, backbone_of
from tests.datasets import architecture
from tests.support.networks import KINDS, network


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_strides_and_channels_it_names(kind: str) -> None:
    backbone = backbone_of(network(kind))
    size = (16, 48, 32)
    features = backbone.features(torch.randn(1, 1, *size))
    assert [f.shape[1] for f in features] == backbone.channels
    for feature, stride in zip(features, backbone.strides, strict=True):
        assert tuple(feature.shape[2:]) == tuple(n // s for n, s in zip(size, stride, strict=True))


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_the_first_stages_alone(kind: str) -> None:
    net, image = network(kind), torch.randn(1, 1, 16, 16, 16)
    backbone = backbone_of(net)
    whole = net.get_submodule("encoder")(image)
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


def runs(backbone: Backbone, size: tuple[int, int, int]) -> bool:
    try:
        outputs = backbone.network.train()(torch.randn(1, 1, *size))
    except (RuntimeError, ValueError):
        return False
    return tuple(outputs[0].shape[2:]) == size


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_that_is_called_legal_runs_and_one_that_fails_is_called_illegal(kind: str) -> None:
    backbone = backbone_of(network(kind))
    for size in [
        (4, 4, 8),
        (8, 8, 8),
        (6, 8, 8),
        (12, 8, 16),
        (8, 9, 8),
        (2, 8, 8),
        (16, 20, 24),
        (1, 4, 4),
        (4, 16, 16),
        (4, 16, 32),
    ]:
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


@pytest.mark.parametrize("kind", KINDS)
def test_deep_supervision_switch(kind: str) -> None:
    """On: an output for each stage but the deepest, full resolution first, as stock nnU-Net's loss expects."""
    backbone, size = backbone_of(network(kind)), (8, 32, 32)
    for enabled in (True, False, True):
        backbone.set_deep_supervision(enabled)
        outputs = backbone.network(torch.randn(1, 1, *size))
        assert isinstance(outputs, torch.Tensor) == (not enabled)
    strides = np.cumprod(architecture(kind)["arch_kwargs"]["strides"], axis=0)[:-1]
    assert [tuple(o.shape[2:]) for o in outputs] == [tuple(np.array(size) // stride) for stride in strides]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_in_training_gets_a_gradient(kind: str) -> None:
    """Several GPUs wait for all of them: with all outputs, with the finest alone, with the encoder alone."""
    size = (8, 32, 32)

    def without_gradient(backbone: Backbone, loss: torch.Tensor) -> list[str]:
        loss.backward()
        named = backbone.network.named_parameters()
        return [name for name, p in named if p.requires_grad and p.grad is None]

    backbone = backbone_of(network(kind))
    outputs = backbone.network(torch.randn(2, 1, *size))
    assert without_gradient(backbone, torch.stack([o.square().sum() for o in outputs]).sum()) == []

    backbone = backbone_of(network(kind))
    backbone.set_deep_supervision(False)
    backbone.freeze_coarse_heads()
    assert without_gradient(backbone, backbone.network(torch.randn(2, 1, *size)).square().sum()) == []

    for stages in {1, len(backbone.strides)}:
        backbone = backbone_of(network(kind))
        backbone.train_encoder_only(stages)
        features = backbone.features(torch.randn(2, 1, *size), stages)
        assert len(features) == stages
        assert without_gradient(backbone, features[-1].square().sum()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_channels_stay_equal(kind: str) -> None:
    backbone = backbone_of(network(kind, 2))
    backbone.network.eval()
    backbone.equalize_input_channels()
    image = torch.randn(1, 2, 8, 32, 32)
    with torch.no_grad():
        here, there = backbone.features(image), backbone.features(image.flip(1))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nnunets_own_transfer_finds_the_encoder(kind: str) -> None:
    found: Any = network(kind)
    assert found.get_submodule(found.key_to_encoder)
    assert found.get_submodule(found.key_to_stem)
    shapes = {found.get_submodule(key).weight.shape for key in found.keys_to_in_proj}
    assert shapes == {backbone_of(found).stem.weight.shape}


def test_depth_strides_of_each_network() -> None:
    image = torch.randn(1, 1, 4, 32, 32)
    for kind in ("plain", "residual", "pct_net"):
        backbone = backbone_of(network(kind).eval())
        backbone.drop_depth_strides()
        assert {feature.shape[2] for feature in backbone.features(image)} == {4}
    with pytest.raises(ValueError, match="Use a U-Net"):
        backbone_of(network("vit")).drop_depth_strides()


def test_unknown_networks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        backbone_of(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_output_run_the_encoder_once(kind: str) -> None:
    backbone = backbone_of(network(kind))
    backbone.network.eval()
    backbone.set_deep_supervision(False)
    image, calls = torch.randn(1, 1, 16, 32, 32), []
    with torch.no_grad():
        expected = backbone.features(image), backbone.output(image)
        backbone.stem.register_forward_pre_hook(lambda *_: calls.append(1))
        maps, output = backbone.features_and_output(image)
    assert len(calls) <= 1  # a vision transformer's is a matrix product
    assert len(maps) == len(expected[0])
    for found, map_ in zip(maps, expected[0], strict=True):
        torch.testing.assert_close(found, map_)
    torch.testing.assert_close(output, expected[1])
