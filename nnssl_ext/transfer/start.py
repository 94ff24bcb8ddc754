"""Start a training from foreign weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl_ext import checkpoint
from nnssl_ext.networks.backbone import HEADS
from nnssl_ext.transfer.heads import output_names
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import LEFT, Report
from nnssl_ext.transfer.transfer import TargetNetwork, transfer


def fill_networks(
    networks: Iterable[nn.Module], text: str, spacing: Sequence[float], patch_size: Sequence[int]
) -> Report:
    """Fill networks of one structure with pretrained weights.

    Args:
        networks: Networks at their initial values, such as student and teacher. One that is given twice is filled once.
        text: A source, as ``nnssl_ext transfer`` takes it.
        spacing: Millimeters per voxel of the crops.
        patch_size: Edges of the crops in voxels.

    Raises:
        UserError: If the source cannot be read or does not fit.
    """
    source = read_source(text)
    reports = [
        transfer(source, TargetNetwork(network, tuple(spacing), tuple(patch_size)))
        for network in {id(network): network for network in networks}.values()
    ]
    reports[0].remarks.insert(0, f"Starting from {source.path} ({source.kind}).")
    return reports[0]


def pretrained_weights_argument(arguments: Sequence[str]) -> Path | None:
    """Find the file of ``-pretrained_weights`` in a command."""
    for word, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "-pretrained_weights":
            return Path(value)
        if word.startswith("-pretrained_weights="):
            return Path(word.partition("=")[2])
    return None


def load_heads(network: nn.Module, file: Path, dataset_json: Mapping[str, Any]) -> list[str]:
    """Load heads that ``nnssl_ext transfer`` filled by label.

    Stock nnU-Net's loader skips heads. Those of other files, and of a data set of other labels, are left out.

    Returns:
        The names of the loaded tensors.
    """
    try:
        content = checkpoint.load(file)
    except SystemExit:  # not a file of ours
        return []
    transferred = content["nnssl_ext"].get("transfer", {})
    names, regions = output_names(dataset_json)
    if transferred.get("outputs") != [*names] or transferred.get("regions") != regions:
        return []
    rows = transferred["rows"]
    filled = [row["name"] for row in rows if row["action"] != LEFT and HEADS in f".{row['name']}"]
    state = network.state_dict()
    with torch.no_grad():
        for name in filled:
            state[name].copy_(content["network_weights"][name])
    return filled
