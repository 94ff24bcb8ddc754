"""One name for each tensor of a state dict, and what the names of a U-Net say about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nnssl_ext.errors import UserError

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


def canonical_name(name: str) -> str:
    """A tensor's first name: nnU-Net's networks have up to four for one, wrappers put words before it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.startswith("decoder.encoder."):
        name = name.removeprefix("decoder.")
    name = name.replace(".all_modules.0.", ".conv.")
    return re.sub(r"\.all_modules\.\d+\.", ".norm.", name)


def canonical_weights(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state dict with one name for each tensor, in its order.

    Raises:
        UserError: If a tensor's names disagree about its values: whoever made the file changed one name of several.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        first = result.setdefault(canonical_name(name), tensor)
        # a norm and a trained activation behind it may look like one: the norm comes first and has another shape
        if first.data_ptr() == tensor.data_ptr() or first.shape != tensor.shape:
            continue
        if not bool(((first == tensor) | (first != first)).all()):  # no number equals itself if it is not one
            raise UserError(
                f"{where}: '{name}' and '{canonical_name(name)}' name one tensor and hold different values; save "
                f"network.state_dict() of the network itself"
            )
    return result


@dataclass
class UNet:
    """The layers of a U-Net of dynamic-network-architectures, by the names of its tensors.

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
        """The layers of a stage that its features pass one after the other, in order."""
        return [layer for part, layer in self.stages[stage].items() if not part.endswith("skip")]

    @property
    def bottleneck_blocks(self) -> bool:
        return any(part.endswith("conv3") for parts in self.stages.values() for part in parts)


def unet_of(names: Iterable[str]) -> UNet | None:
    """The U-Net that canonical names speak of; None if they speak of something else."""
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
