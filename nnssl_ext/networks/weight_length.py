"""Scale convolutions that a norm follows to given lengths.

A norm cancels the scale of the convolution before it, so the length of that weight does not change the function. It
does change fine-tuning: against a weight k times as long, an SGD step is k^2 times and an Adam step k times smaller.
Pretraining lengthens such weights. Here a length is the Euclidean norm of a whole weight tensor.

Transposed convolutions, heads and the layers of transformers have no norm behind them and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.networks.architectures.unetr import ResidualBlock
from nnssl_ext.networks.base import is_primus

#: A convolution, and the norms whose first channels its output becomes.
NormedConvolution = tuple[_ConvNd, tuple[nn.Module, ...]]

#: Layers that commute with a positive factor.
_HOMOGENEOUS = (_DropoutNd, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)
_NORMS = (_NormBase, nn.GroupNorm)


def normed_convolutions(network: nn.Module) -> list[NormedConvolution]:
    """Find convolutions whose whole output is normed."""
    found: dict[int, NormedConvolution] = {}
    # Primus V2's stem has kernels of one value, some so small that the norm's epsilon matters
    for module in () if is_primus(network) else network.modules():
        for convolution, norms in chain(_in_sequence(module), _in_residual_block(module), _in_pct_net(module)):
            found.setdefault(id(convolution), (convolution, norms))
    return list(found.values())


def convolution_lengths(network: nn.Module) -> dict[str, float]:
    """Measure normed convolutions: name of weight -> length."""
    names = _names(network)
    return {
        f"{names[id(convolution)][0]}.weight": _length(convolution.weight)
        for convolution, _ in normed_convolutions(network)
    }


def length_factors(network: nn.Module, lengths: Mapping[str, float]) -> dict[str, float]:
    """Return the factor that gives each normed convolution its length in ``lengths``. Nothing is scaled."""
    now = convolution_lengths(network)
    return {name: lengths[name] / now[name] for name in now if name in lengths and 0 < now[name] < float("inf")}


def scale_to_lengths(
    network: nn.Module, weights: Mapping[str, Tensor], lengths: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scale convolutions of a state dict to given lengths.

    Weight and bias get the same factor. Running statistics of the norms behind get it too, so the outputs stay equal
    within the norms' epsilon, in training and in evaluation. All names of one tensor get one new tensor.

    Args:
        network: The structure that the state dict belongs to. Its own values are not read.
        weights: The state dict. It is not changed.
        lengths: The wanted lengths, as ``convolution_lengths`` gives them. Convolutions that are missing here, and
            those of length 0 or with values that are not finite, stay as they are.

    Returns:
        The scaled state dict, and the factor of each scaled weight by its first name.
    """
    names, result, factors = _names(network), dict(weights), dict[str, float]()

    def scale(module: nn.Module, tensor: str, factor: float, channels: int | None = None) -> None:
        aliases = [f"{name}.{tensor}" for name in names[id(module)]]
        if aliases[0] in weights:
            scaled = result[aliases[0]].clone()
            scaled[:channels] *= factor
            result.update(dict.fromkeys((name for name in aliases if name in weights), scaled))

    for convolution, norms in normed_convolutions(network):
        name = f"{names[id(convolution)][0]}.weight"
        length = _length(weights[name]) if name in weights and name in lengths else 0.0
        if not 0 < length < float("inf"):
            continue
        factor = factors[name] = lengths[name] / length
        for tensor in ("weight", "bias"):
            scale(convolution, tensor, factor)
        for norm in norms:
            scale(norm, "running_mean", factor, convolution.out_channels)
            scale(norm, "running_var", factor**2, convolution.out_channels)
    return result, factors


def _in_sequence(module: nn.Module) -> Iterator[NormedConvolution]:
    if not isinstance(module, nn.Sequential):
        return
    layers = list(module)
    for place, layer in enumerate(layers):
        if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
            following = next((other for other in layers[place + 1 :] if not isinstance(other, _HOMOGENEOUS)), None)
            if isinstance(following, _NORMS):
                yield layer, (following,)


def _in_residual_block(module: nn.Module) -> Iterator[NormedConvolution]:
    if isinstance(module, ResidualBlock):
        yield module.conv1, (module.norm1,)
        yield module.conv2, (module.norm2,)


def _in_pct_net(module: nn.Module) -> Iterator[NormedConvolution]:
    """Pair convolutions with the next blocks' norms.

    PCT-Net's blocks begin with a norm.

    Where window attention, which adds its input, sees the map too, there is no pair. Max pooling lies between some of
    them and commutes with the factor. In concatenations the skip comes first.
    """
    if not isinstance(module, PCTNet):
        return
    for embedding, head in zip(module.embeddings, module.pred_heads, strict=True):
        e, h = dict(embedding.named_modules()), dict(head.named_modules())
        yield e["proj"], (e["conv0.conv_conv.0"],)
        yield e["conv0.conv_conv.6"], (e["down1.conv.0"], h["up1.conv.0"])
        yield e["down1.conv.2"], (e["conv1.conv_conv.0"],)
        yield e["conv1.conv_conv.6"], (e["down2.conv.0"], h["up2.conv.0"])
        yield h["up2.conv.2"], (h["conv1.conv_conv.0"],)
        yield h["conv1.conv_conv.6"], (h["up1.up.0"], h["out_conv1.conv.0"])
        yield h["up1.conv.2"], (h["conv0.conv_conv.0"],)
        yield h["conv0.conv_conv.6"], (h["out_conv0.conv.0"],)


def _names(network: nn.Module) -> dict[int, list[str]]:
    """Return all names of each module. U-Nets of dynamic-network-architectures have up to four for one."""
    names: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _length(weight: Tensor) -> float:
    # Apple's GPUs have no float64
    return float(torch.linalg.vector_norm(weight.detach().cpu(), dtype=torch.float64))
