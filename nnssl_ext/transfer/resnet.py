"""Read a 3-D ResNet-18 as a residual encoder.

The file that Zhang et al. (arXiv 2201.01426) released keeps it under ``state_dict``. It corresponds to a residual
encoder with features 64/64/128/256/512 and 1/2/2/2/2 blocks without bias. Its 7x7x7 stem and the classifier have no
counterpart.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"layer(?P<layer>\d)\.(?P<block>\d+)\.(?P<kind>conv|bn)(?P<part>\d)\.(?P<rest>.+)$")
_SKIP = re.compile(r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.(?P<part>[01])\.(?P<rest>.+)$")
_STEM = re.compile(r"(?P<kind>conv|bn)1\.(?P<rest>.+)$")
_KINDS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}

NOTE = (
    "A ResNet's layers were taken as the stages of the same number: its weights do not depend on the stride. In the "
    "first blocks of stages 2 to 4 it strides the skip's convolution, where nnU-Net averages before it: these blocks "
    "compute something else."
)


def renamed(name: str) -> str:
    """Rename a tensor as in a residual encoder.

    Layer L is stage L, and there is no stage 0. Other tensors keep their names.
    """
    name = re.sub(r"^(?:module\.|backbone\.)+", "", name)
    if found := _BLOCK.match(name):
        stage, kind = f"encoder.stages.{found['layer']}.blocks.{found['block']}", _KINDS[found["kind"]]
        return f"{stage}.conv{found['part']}.{kind}.{found['rest']}"
    if found := _SKIP.match(name):
        stage = f"encoder.stages.{found['layer']}.blocks.{found['block']}"
        return f"{stage}.skip.0.{_KINDS[found['part']]}.{found['rest']}"
    if found := _STEM.match(name):
        return f"encoder.stem.convs.0.{_KINDS[found['kind']]}.{found['rest']}"
    return name
