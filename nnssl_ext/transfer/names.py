"""Reduce tensor names and recognize networks by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

_STAGE = r"\d+(?:\.\d+)?"  # a pooling encoder puts its stage behind the pooling layer
_PATTERNS = {
    "stem": re.compile(r"encoder\.stem\.convs\.0$"),
    "plain": re.compile(rf"encoder\.stages\.(?P<stage>{_STAGE})\.(?P<part>convs\.\d+)$"),
    "block": re.compile(rf"encoder\.stages\.(?P<stage>{_STAGE})\.(?P<part>blocks\.\d+\.conv\d)$"),
    "skip": re.compile(rf"encoder\.stages\.(?P<stage>{_STAGE})\.(?P<part>blocks\.\d+\.skip)\.\d$"),
    "decoder": re.compile(
        r"decoder\.stages\.(?P<stage>\d+)\.(?P<part>(?:convs\.\d+|blocks\.\d+\.(?:conv\d|skip\.\d)))$"
    ),
}
_UPSAMPLING = re.compile(r"(decoder\.transpconvs\.(\d+))\.weight$")
#: Words that wrappers put before every name: DDP, torch.compile, Lightning, MONAI.
_WRAPPERS = ("module.", "_orig_mod.", "net.", "network.", "model.")

#: Parts of MONAI's names of a vision transformer's tensors, and DINOv2's.
_MONAI = {
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.linear1.": ".mlp.fc1.",
    ".mlp.linear2.": ".mlp.fc2.",
    "patch_embedding.patch_embeddings.": "patch_embed.proj.",
    "patch_embedding.position_embeddings": "pos_embed",
}

U_NET, PRIMUS, PCT_NET, VIT, RESNET = "U-Net", "Primus", "PCT-Net", "vision transformer", "ResNet"
#: What the names of a family look like, wrappers removed.
_FAMILIES = {
    U_NET: re.compile(r"encoder\.(stages|stem)\."),
    PRIMUS: re.compile(r"(eva\.blocks|down_projection)\."),
    PCT_NET: re.compile(r"pyramid_ct\."),
    VIT: re.compile(r"(backbone\.)?blocks\.(\d+\.)+attn\.qkv\.weight$"),
    RESNET: re.compile(r"(backbone\.)*layer4\.0\.conv1\.weight$"),
}


def canonical_name(name: str) -> str:
    """Reduce a tensor's name to its first alias. nnU-Net's networks have up to four names for one tensor."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.startswith("decoder.encoder."):
        name = name.removeprefix("decoder.")
    name = name.replace(".all_modules.0.", ".conv.")
    return re.sub(r"\.all_modules\.\d+\.", ".norm.", name)


def canonical_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reduce a state dict to one name per tensor. Of aliases that differ the last wins, as in torch."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        first = result.setdefault(canonical_name(name), tensor)
        # a norm and a trained activation behind it may look like one: the norm comes first and has another shape
        if first.shape == tensor.shape:
            result[canonical_name(name)] = tensor
    return result


def differing_aliases(weights: Mapping[str, Tensor]) -> list[str]:
    """List the canonical names whose aliases hold different values."""
    chosen = canonical_weights(weights)
    found: dict[str, None] = {}
    for name, tensor in weights.items():
        other = chosen[canonical_name(name)]
        if tensor.data_ptr() == other.data_ptr() or tensor.shape != other.shape:
            continue
        if not bool(((tensor == other) | ((tensor != tensor) & (other != other))).all()):  # a NaN is no number
            found[canonical_name(name)] = None
    return list(found)


def family_of(names: Iterable[str]) -> str:
    """Recognize a network's family by names, else ''."""
    names = list(names)
    return next((family for family, known in _FAMILIES.items() if any(map(known.match, names))), "")


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrappers' words before names of known families."""
    shorter = dict(weights)
    for _ in range(4):
        if family_of(shorter):
            return shorter
        shorter = {_unwrapped(name): tensor for name, tensor in shorter.items()}
    return dict(weights)


def from_monai(name: str) -> str:
    """Rename a vision transformer's tensor from MONAI's to DINOv2's."""
    for theirs, ours in _MONAI.items():
        name = name.replace(theirs, ours)
    return name


def _unwrapped(name: str) -> str:
    wrapper = next((word for word in _WRAPPERS if name.startswith(word)), "")
    return name.removeprefix(wrapper)


@dataclass
class UNet:
    """List a U-Net's layers by the names of its tensors.

    Attributes:
        stem: The convolution that reads the image.
        stages: Stage -> part ('convs.1', 'blocks.0.conv2', 'blocks.0.skip') -> layer, the stem's left out.
        decoder: Stage of the encoder whose resolution it has -> part -> layer.
        upsampling: The same -> layer.
        residual: Whether the encoder has residual blocks.
    """

    stem: str | None = None
    stages: dict[int, dict[str, str]] = field(default_factory=dict)
    decoder: dict[int, dict[str, str]] = field(default_factory=dict)
    upsampling: dict[int, str] = field(default_factory=dict)
    residual: bool = False

    def path(self, stage: int) -> list[str]:
        """List the layers that a stage's features pass."""
        return [layer for part, layer in self.stages[stage].items() if not part.endswith("skip")]

    @property
    def bottleneck_blocks(self) -> bool:
        return any(part.endswith("conv3") for parts in self.stages.values() for part in parts)


def unet_of(names: Iterable[str]) -> UNet | None:
    """Find the U-Net that names describe, else None."""
    names = list(names)
    layers = [name.removesuffix(".conv.weight") for name in names if name.endswith(".conv.weight")]
    result, last = UNet(), -1
    for layer in layers:
        kind, found = next(((k, m) for k, p in _PATTERNS.items() if (m := p.match(layer))), ("", None))
        if found is None or kind == "decoder":
            continue
        if kind == "stem":
            result.stem = layer
            continue
        stage = int(found["stage"].split(".")[0])
        last = max(last, stage)
        result.residual |= kind != "plain"
        if kind == "plain" and stage == 0 and found["part"] == "convs.0":
            result.stem = layer
            result.stages.setdefault(0, {})
        else:
            result.stages.setdefault(stage, {})[found["part"]] = layer
    if not result.stages:
        return None
    for layer in layers:
        if found := _PATTERNS["decoder"].match(layer):
            result.decoder.setdefault(last - 1 - int(found["stage"]), {})[found["part"]] = layer
    for name in names:
        if found := _UPSAMPLING.match(name):
            result.upsampling[last - 1 - int(found[2])] = found[1]
    return result
