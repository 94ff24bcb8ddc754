"""What a pretraining run writes into its checkpoint, and what must agree when it is continued."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from nnssl_ext import __version__, checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.networks.backbone import HEADS
from nnssl_ext.resources import PACKAGE
from nnssl_ext.training.preflight import Checked

#: Common settings that a continued run may change: they change neither the data nor a step.
FREE = ("save_every", "validation_iterations", "epochs")


def network_weights(method: Method, heads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The complete state dict of the data set's own network: all that was pretrained, under every alias, and fresh
    heads of the data set's width where the method trained heads of its own."""
    weights = method.exported.state_dict()
    return {**{k: v for k, v in weights.items() if not (heads and HEADS in f".{k}")}, **heads}


def fresh_heads(network: nn.Module) -> dict[str, Tensor]:
    """The heads of a newly built network of the data set's width, under every alias."""
    return {k: v for k, v in network.state_dict().items() if HEADS in f".{k}"}


def own_section(method: Method, checked: Checked, step: int, identity: dict[str, Any]) -> dict[str, Any]:
    """What stands under ``nnssl_ext``: enough to continue exactly, and to know what the weights are."""
    return {
        "format": checkpoint.FORMAT,
        "method": method.name,
        "title": method.title,
        "settings": {"common": asdict(checked.common), method.name: asdict(checked.settings)},
        "identity": identity,
        "state": method.state_dict(),
        "trained": [name for name, p in method.exported.named_parameters() if p.requires_grad],
        "counters": {"step": step, "samples": step * checked.batch_size},
        "cases": len(checked.index.cases),
        "versions": versions(),
        "revision": revision(),
    }


def identity(method: type[Method], checked: Checked, plans: dict, configuration: str) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common."""
    common = {k: v for k, v in asdict(checked.common).items() if k not in FREE}
    return checkpoint.plain({
        "method": method.name,
        "dataset": plans["dataset_name"],
        "configuration": configuration,
        "architecture": plans["configurations"][configuration].get("architecture", {}),
        "geometry": asdict(checked.geometry),
        "batch_size": checked.batch_size,
        "settings": {**common, method.name: asdict(checked.settings)},
    })  # fmt: skip


def refuse_other_run(stored: dict[str, Any], mine: dict[str, Any], source: str) -> None:
    """One line about the first thing in which a checkpoint belongs to another run.

    Raises:
        UserError: If anything in ``identity`` differs.
    """
    difference = _first_difference(stored, _jsonlike(mine), "")
    if difference:
        name, theirs, ours = difference
        raise UserError(
            f"{source} belongs to another run: {name} is {theirs!r} there and {ours!r} here; continue with the plans "
            f"it was made with, or start anew without --c"
        )


def adaptation_plan(plans: dict, configuration: str, method: Method, checked: Checked) -> dict[str, Any]:
    """The contract by which nnU-Net's nnUNetv2_train_pretrained and nnssl read a pretrained checkpoint."""
    architecture = plans["configurations"][configuration]["architecture"]
    config = {**plans["configurations"][configuration], "patch_size": list(checked.geometry.crop_size)}
    config["spacing"] = list(checked.geometry.spacing)
    network = method.exported
    return {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"].rsplit(".", 1)[-1],
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {"plans_name": plans["plans_name"], "configurations": {configuration: config}},
        "pretrain_num_input_channels": checked.geometry.channels,
        "recommended_downstream_patchsize": list(checked.geometry.crop_size),
        "key_to_encoder": getattr(network, "key_to_encoder", "encoder.stages"),
        "key_to_stem": getattr(network, "key_to_stem", "encoder.stem"),
        "keys_to_in_proj": list(getattr(network, "keys_to_in_proj", ())),
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    found = {"nnssl_ext": __version__, "python": platform.python_version()}
    for package in ("nnunetv2", "torch", "dynamic-network-architectures", "batchgenerators"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@cache
def revision() -> str:
    """The git revision of a checkout; '' for an installed package."""
    if not (PACKAGE.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _jsonlike(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonlike(v) for k, v in value.items()}
    return [_jsonlike(v) for v in value] if isinstance(value, (list, tuple)) else value


def _first_difference(stored: Any, mine: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(mine, dict):
        for key in [*mine, *(k for k in stored if k not in mine)]:
            found = _first_difference(stored.get(key), mine.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if _jsonlike(stored) == mine else (name, stored, mine)
