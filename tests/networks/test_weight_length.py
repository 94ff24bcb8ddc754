"""Convolutions that a norm follows are found by structure, and scaling them keeps the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import PrimusV2
from torch import Tensor, nn

from nnssl_ext.networks.architectures.pct_net import STRIDES, PCTNet
from nnssl_ext.networks.weight_length import convolution_lengths, normed_convolutions, scale_to_lengths
from tests.datasets import architecture
from tests.transfer.helpers import built, planned

BATCH_NORM: dict[str, Any] = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
DROPOUT: dict[str, Any] = {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.3}}


def unet(kind: str = "plain", **changes: Any) -> Callable[[], nn.Module]:
    return lambda: built(planned(kind, **changes))


def own(kind: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        plan = architecture(kind)
        return built({**plan, "arch_kwargs": {**plan["arch_kwargs"], **changes}})

    return build


def residual_decoder() -> nn.Module:
    plan = planned("residual")
    name = plan["network_class_name"].replace("ResidualEncoderUNet", "ResidualUNet")
    return built({**plan, "network_class_name": name})


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": unet(),
    "plain, batch norm": unet(**BATCH_NORM),
    "plain, dropout": unet(**DROPOUT),
    "plain, activation before norm": unet(nonlin_first=True, **BATCH_NORM),
    "anisotropic": unet("anisotropic"),
    "residual": unet("residual"),
    "residual, batch norm": unet("residual", **BATCH_NORM),
    "residual, bottlenecks": unet("residual", bottleneck_channels=4),
    "residual decoder": residual_decoder,
    "vit": own("vit"),
    "pct_net, isotropic": own("pct_net", strides=STRIDES[0]),
    "pct_net, thick slices": own("pct_net", strides=STRIDES[1]),
    "pct_net, thickest slices": own("pct_net", strides=STRIDES[2]),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = True  # type: ignore[union-attr]
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if isinstance(module, nn.Conv3d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network


def outputs(network: nn.Module, training: bool = False) -> Tensor:
    torch.manual_seed(1)
    network.train(training)
    for module in network.modules():  # chance is the same in both runs, but not what it meets
        if module.__class__.__name__.startswith(("Drop", "PatchDrop")):
            module.eval()
    edge = 32 if isinstance(network, PCTNet) else 16
    with torch.no_grad():
        found = network(torch.randn(2, 1, edge, edge, edge, generator=torch.Generator().manual_seed(2)))
    return torch.cat([o.flatten() for o in (found if isinstance(found, (list, tuple)) else [found])])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def test_every_convolution_whose_scale_does_not_matter_is_found_and_no_other(network: nn.Module) -> None:
    listed = {id(convolution) for convolution, _ in normed_convolutions(network)}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = outputs(network, training=True)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.weight.requires_grad]
    for convolution in convolutions:
        with torch.no_grad():
            convolution.weight *= 2
            if convolution.bias is not None:
                convolution.bias *= 2
        after = outputs(network, training=True)
        assert (difference(before, after) < 3e-3) == (id(convolution) in listed), convolution
        network.load_state_dict(state)
    assert any(id(convolution) not in listed for convolution in convolutions)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_equal_at_initial_lengths(network: nn.Module, training: bool) -> None:
    lengths = convolution_lengths(network)
    draw = torch.Generator().manual_seed(3)
    grown = {}
    for convolution, _ in normed_convolutions(network):
        grown[id(convolution)] = float(torch.empty(1).uniform_(0.7, 6, generator=draw))
        with torch.no_grad():
            convolution.weight *= grown[id(convolution)]
    trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = outputs(network, training)
    network.load_state_dict(trained)  # training outputs move the running statistics

    scaled, factors = scale_to_lengths(network, network.state_dict(), lengths)

    assert list(factors.values()) == pytest.approx([1 / growth for growth in grown.values()], rel=1e-5)
    assert all(torch.equal(trained[name], tensor) for name, tensor in network.state_dict().items())
    network.load_state_dict(scaled)
    assert convolution_lengths(network) == pytest.approx(lengths, rel=1e-5)
    assert difference(before, outputs(network, training)) < 3e-3


def test_every_name_of_a_tensor_gets_the_same_scaled_tensor() -> None:
    network = NETWORKS["plain"]()
    lengths = {name: 2 * length for name, length in convolution_lengths(network).items()}
    scaled, factors = scale_to_lengths(network, network.state_dict(), lengths)
    assert list(factors) == list(lengths)
    assert list(factors.values()) == pytest.approx([2.0] * len(lengths))
    place = "encoder.stages.1.0.convs.0"
    names = [f"{at}{place}.{name}.weight" for at in ("", "decoder.") for name in ("conv", "all_modules.0")]
    assert len({scaled[name].data_ptr() for name in names}) == 1
    assert torch.equal(scaled[names[0]], 2 * network.state_dict()[names[0]])


def test_transformers_have_no_such_convolution() -> None:
    network = PrimusV2(1, 72, (8, 8, 8), 3, 2, 6, (32, 32, 32), scale_attn_inner=True, init_values=0.1)
    assert normed_convolutions(network) == []
    assert all(name.startswith("decoder.") for name in convolution_lengths(NETWORKS["vit"]()))


def test_heads_and_transposed_convolutions_are_not_scaled() -> None:
    network = NETWORKS["residual"]()
    lengths = {name: 3 * length for name, length in convolution_lengths(network).items()}
    before, (after, _) = network.state_dict(), scale_to_lengths(network, network.state_dict(), lengths)
    for name in before:
        if "seg_layers" in name or "transpconvs" in name or "norm" in name:
            assert torch.equal(before[name], after[name]), name


def test_an_unusable_length_leaves_the_weight_alone() -> None:
    network = NETWORKS["plain"]()
    lengths = convolution_lengths(network)
    weights = dict(network.state_dict())
    zero, broken, missing = list(lengths)[:3]
    weights[zero], weights[broken] = torch.zeros_like(weights[zero]), weights[broken] * float("nan")
    del lengths[missing]
    _, factors = scale_to_lengths(network, weights, lengths)
    assert not {zero, broken, missing} & set(factors)
    assert len(factors) == len(lengths) - 2


class OnApple(Tensor):
    """A tensor of a device without float64, until it is copied to the CPU."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if (options or {}).get("dtype") is torch.float64:
            raise TypeError("the device has no float64")
        result = super().__torch_function__(function, types, arguments, options)
        return result.as_subclass(Tensor) if function is Tensor.cpu else result


def test_lengths_are_measured_of_weights_on_a_device_without_float64() -> None:
    network = NETWORKS["plain"]()
    lengths = convolution_lengths(network)
    weights = {name: tensor.as_subclass(OnApple) for name, tensor in network.state_dict().items()}
    _, factors = scale_to_lengths(network, weights, lengths)
    assert factors == pytest.approx(dict.fromkeys(lengths, 1.0))
