"""ResNet3D-18 by its usual names, as a residual encoder.

The file that Zhang et al. (arXiv 2201.01426) released keeps it under ``state_dict``. It corresponds to a residual
encoder with features 64/64/128/256/512 and 1/2/2/2/2 blocks without bias; its 7x7x7 stem and the classifier have no
counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_BLOCK = re.compile(r"layer(?P<layer>\d)\.(?P<block>\d+)\.(?P<kind>conv|bn)(?P<part>\d)\.(?P<rest>.+)$")
_SKIP = re.compile(r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.(?P<part>[01])\.(?P<rest>.+)$")
_STEM = re.compile(r"(?P<kind>conv|bn)1\.(?P<rest>.+)$")
_KINDS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}


def is_resnet(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a ResNet with basic or bottleneck blocks."""
    return {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= {_plain(name) for name in weights}


def as_residual_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that a residual encoder has: layer L is stage L, there is no stage 0."""
    return {renamed(_plain(name)): tensor for name, tensor in weights.items()}


def renamed(name: str) -> str:
    """One tensor's name in a residual encoder; a classifier's stays as it is."""
    if found := _BLOCK.match(name):
        stage, kind = f"encoder.stages.{found['layer']}.blocks.{found['block']}", _KINDS[found["kind"]]
        return f"{stage}.conv{found['part']}.{kind}.{found['rest']}"
    if found := _SKIP.match(name):
        stage = f"encoder.stages.{found['layer']}.blocks.{found['block']}"
        return f"{stage}.skip.0.{_KINDS[found['part']]}.{found['rest']}"
    if found := _STEM.match(name):
        return f"encoder.stem.convs.0.{_KINDS[found['kind']]}.{found['rest']}"
    return name


def _plain(name: str) -> str:
    changed = True
    while changed:
        shorter = name.removeprefix("module.").removeprefix("backbone.")
        changed, name = shorter != name, shorter
    return name
