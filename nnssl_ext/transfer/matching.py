"""Match tensors of target and source by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from nnssl_ext.networks.backbone import HEADS
from nnssl_ext.transfer.names import UNet

#: Tensors of a layer beside its convolution's weight. They mean nothing without it.
COMPANIONS = (
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
)

#: Layers of a decoder's stage that see the up-sampled map beside the skip.
CONCATENATED = ("convs.0", "blocks.0.conv1", "blocks.0.skip")

#: A transformer's block, and the LayerScale behind its attention or its perceptron. timm's Eva names it gamma.
_LAYER_SCALE = re.compile(r"(.*\bblocks\.\d+\.)(?:ls[12]\.gamma|gamma_[12])$")


@dataclass(frozen=True)
class Match:
    """The source's tensor for a tensor of the target.

    Attributes:
        source: The source's tensor; '' if there is none.
        rule: How it is fitted: a key of ``rules.RULES``.
        reason: Why there is none.
        leader: The target's tensor without which this one stays as it is.
    """

    source: str = ""
    rule: str = "same"
    reason: str = ""
    leader: str = ""


def by_name(targets: Iterable[str], sources: Iterable[str]) -> dict[str, Match]:
    """Match tensors of equal names."""
    present = set(sources)
    return {
        name: Match(name) if name in present else Match(reason="the source has no tensor of this name")
        for name in targets
    }


def heads(targets: Iterable[str], sources: Iterable[str], labels: bool) -> dict[str, Match]:
    """Match segmentation heads where labels are known."""
    present, result = set(sources), {}
    for name in targets:
        if HEADS in f".{name}":
            source = name if labels and name in present else ""
            result[name] = Match(source, "outputs", "" if source else "a segmentation head is not transferred")
    return result


def image_readers(targets: Iterable[str], first_layers: Iterable[str]) -> list[str]:
    """List the weights that see the image's channels.

    In a residual block that is the first layer, the convolution of its skip sees the image too.
    """
    wanted = {f"{layer}.weight" for layer in first_layers}
    blocks = [layer.removesuffix("conv1.conv") for layer in first_layers if layer.endswith(".conv1.conv")]
    skips = [re.compile(rf"{re.escape(block)}skip\.\d+\.conv\.weight$") for block in blocks]
    return [name for name in targets if name in wanted or any(skip.match(name) for skip in skips)]


def image_convolutions(matches: Mapping[str, Match], layers: Iterable[str]) -> dict[str, Match]:
    """Fit convolutions that see the image to its channels."""
    return {
        name: Match(matches[name].source, "image convolution", matches[name].reason)
        for name in image_readers(matches, list(layers))
    }


def unet(target: UNet, source: UNet, alignment: Mapping[int, int | None], absent: str) -> dict[str, Match]:
    """Match the layers of two U-Nets.

    Args:
        target, source: Their layers.
        alignment: The source's stage for each stage of the target.
        absent: Why a stage of the target has no partner.
    """
    result: dict[str, Match] = {}
    if target.stem:
        reason = "" if source.stem else "the source has no layer that reads an image"
        result.update(_layer(target.stem, source.stem, "image convolution", reason))
    for stage, parts in target.stages.items():
        partner_stage = alignment[stage]
        for part, layer in parts.items():
            if partner_stage is None:
                result.update(_layer(layer, None, "convolution", absent))
            else:
                partner, reason = _partner(target, source, stage, partner_stage, part)
                result.update(_layer(layer, partner, "convolution", reason))
    result.update(_decoder(target, source, alignment))
    return result


def _partner(target: UNet, source: UNet, stage: int, partner_stage: int, part: str) -> tuple[str | None, str]:
    if target.bottleneck_blocks != source.bottleneck_blocks:
        return None, "bottleneck blocks and other blocks have no layers in common"
    if target.residual == source.residual:
        layer = source.stages[partner_stage].get(part)
        return layer, "" if layer else f"stage {partner_stage} of the source has no such layer"
    if part.endswith("skip"):
        return None, "a plain encoder has no residual connections"
    place = target.path(stage).index(target.stages[stage][part])
    path = source.path(partner_stage)
    return (path[place], "") if place < len(path) else (None, f"stage {partner_stage} of the source has fewer layers")


def _decoder(target: UNet, source: UNet, alignment: Mapping[int, int | None]) -> dict[str, Match]:
    result: dict[str, Match] = {}
    for stage, parts in target.decoder.items():
        partner_stage = alignment[stage]
        for part, layer in parts.items():
            partner = source.decoder.get(-1 if partner_stage is None else partner_stage, {}).get(part)
            rule = "concatenation" if part.startswith(CONCATENATED) else "convolution"
            result.update(_layer(layer, partner, rule, "" if partner else "no such layer in the source's decoder"))
    for stage, layer in target.upsampling.items():
        partner_stage, below = alignment[stage], alignment[stage + 1]
        partner = None if partner_stage is None or below != partner_stage + 1 else source.upsampling.get(partner_stage)
        reason = "" if partner else "the source's decoder does not lead from the one resolution to the other"
        weight = f"{layer}.weight"
        result[weight] = Match(f"{partner}.weight" if partner else "", "upsampling", reason)
        result[f"{layer}.bias"] = Match(f"{partner}.bias" if partner else "", "vector", reason, weight)
    return result


def _layer(layer: str, partner: str | None, rule: str, reason: str) -> dict[str, Match]:
    """Match a convolution, its bias and its norm."""
    weight = f"{layer}.conv.weight"
    result = {weight: Match(f"{partner}.conv.weight" if partner else "", rule, reason)}
    for companion in COMPANIONS:
        source = f"{partner}.{companion}" if partner else ""
        result[f"{layer}.{companion}"] = Match(source, "vector", reason, weight)
    return result


def transformer(targets: Iterable[str], sources: Collection[str], first_layers: Iterable[str]) -> dict[str, Match]:
    """Match a transformer's tensors by name and rule.

    A source without LayerScale adds each block's output as it is. In the target that is a LayerScale of ones.
    """
    result = by_name(targets, sources)
    scaled = any(map(_LAYER_SCALE.match, sources))
    for name in image_readers(result, list(first_layers)):
        result[name] = Match(result[name].source, "image patches", result[name].reason)
    for name, match in result.items():
        if name.endswith("pos_embed"):
            result[name] = Match(match.source, "positions", match.reason)
        elif name.startswith("up_projection."):
            result[name] = Match(reason="the decoder is fresh: its widths follow from the number of classes")
        elif not scaled and (found := _LAYER_SCALE.match(name)) and f"{found[1]}attn.qkv.weight" in sources:
            result[name] = Match(f"{found[1]}attn.qkv.weight", "ones")
    return result
