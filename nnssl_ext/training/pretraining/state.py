"""Define the content of a pretraining checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_ext import checkpoint
from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.networks.base import LearnedPositions
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.networks.weight_length import length_factors, scale_to_lengths
from nnssl_ext.provenance import hardware, revision, versions
from nnssl_ext.training.checks import Checked
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.transfer.locate import locate
from nnssl_ext.transfer.report import LEFT
from nnssl_ext.transfer.start import fill_networks

#: Common settings that a continued run may change: they change neither the data nor a step.
FREE = (
    "save_every",
    "pretext_picture_every",
    "validation_iterations",
    "epochs",
    "images",
    "max_unreadable_fraction",
    "max_nonfinite_batches",
    "max_time",
    "on_write_failure",
    "write_in_background",
    "keep_host_memory",
    "activation_checkpointing",
    "restore_weight_lengths",
)
#: The terms of the steps of an epoch, one dict per step, each term (B,).
Outputs = list[dict[str, Tensor]]


def of_all_processes(outputs: Outputs) -> Outputs:
    """Gather the terms of all processes."""
    if world() == 1:
        return outputs
    everyone: list[Outputs] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, [{k: v.cpu() for k, v in step.items()} for step in outputs])
    return [step for part in everyone for step in part]


def stored(outputs: Outputs) -> dict[str, Tensor]:
    """Join an epoch's terms for a checkpoint, one tensor each."""
    return {key: torch.cat([step[key] for step in outputs]).cpu() for key in outputs[0]} if outputs else {}


def restored(terms: dict[str, Tensor], device: torch.device) -> Outputs:
    """Split the terms of ``stored`` over processes. The first process takes all of them."""
    if not terms:
        return []
    return [{key: (value if rank() == 0 else value[:0]).to(device) for key, value in terms.items()}]


def start_from(method: Method, text: str) -> tuple[str, list[str]]:
    """Start from pretrained weights.

    A finished run of the same method hands over network, heads, teacher and centers. Every other source that
    ``nnssl_ext transfer`` takes fills the network, and the teacher where there is one.

    Returns:
        A text for the log, and the names of the tensors that have trained values now.

    Raises:
        UserError: If the source cannot be read, does not fit, or is the method's own run with another network.
    """
    path, _ = locate(text)
    own = _own_section(path)
    if own.get("method") == method.name and "state" in own:
        _take_over(method, own, path)
        return f"Starting from {path}", list(own.get("trained", []))
    geometry = method.geometry
    report = fill_networks((method.network, method.exported), text, geometry.spacing, geometry.crop_size)
    return str(report), [row.name for row in report.rows if row.action != LEFT]


def filled_by(method: Method, path: Path) -> list[str]:
    """List the tensors that stock's ``-pretrained_weights`` filled: all but heads that its file holds trained."""
    names = [name for name, _ in method.network.named_parameters() if not method.backbone.is_head(name)]
    trained = _own_section(path).get("trained")
    return names if trained is None else [name for name in trained if not method.backbone.is_head(name)]


def _own_section(path: Path) -> dict[str, Any]:
    """Load the ``nnssl_ext`` section of one of our checkpoints."""
    try:
        return checkpoint.load(path)["nnssl_ext"]
    except UserError:
        return {}  # the transfer reads other kinds of files, and says what is wrong with this one


def _take_over(method: Method, own: Mapping[str, Any], path: Path) -> None:
    """Load the state of a finished run. The crop may differ: positions are resized to the network's grid."""
    mine, theirs = method.state_dict(), dict(own["state"])
    learned = method.backbone.learned_positions()
    for name, tensor in mine.items():
        if learned and name in theirs and name.endswith(".pos_embed") and tensor.shape == learned.table.shape:
            theirs[name] = _resized_positions(theirs[name], own.get("position_grid"), learned, path)
    wrong = sorted(k for k in {*mine, *theirs} if k not in mine or k not in theirs or mine[k].shape != theirs[k].shape)
    if wrong:
        raise UserError(
            f"start_from={path} belongs to another network or other heads: '{wrong[0]}' differs, and {len(wrong) - 1} "
            f"more tensors. Plan with the same recipe"
        )
    method.load_state_dict(theirs)
    method.after_start_from()


def _resized_positions(table: Tensor, grid: Sequence[int] | None, learned: LearnedPositions, path: Path) -> Tensor:
    """Resize learned positions to the network's token grid."""
    number = table.shape[1] - learned.prefix
    if grid is None:  # files of earlier versions do not say it
        grid = [round(number ** (1 / 3))] * 3
    if math.prod(grid) != number:
        raise UserError(
            f"start_from={path} has {number} positions of tokens, and does not say of which grid. Plan with the patch "
            f"size and position_grid that it was made with"
        )
    return table if tuple(grid) == learned.grid else resize_positions(table, grid, learned.grid, learned.prefix)


def network_weights(
    method: Method, heads: Mapping[str, Tensor], lengths: Mapping[str, float], restore: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict of the data set's own network.

    It holds all pretrained tensors under every alias. Fresh ``heads`` of the data set's width take the place of heads
    that the method trained for itself. ``restore`` scales convolutions before a norm to their initial ``lengths``.

    Returns:
        The state dict, and what it says of lengths: whether they are ``restored``, and the ``factors`` by name that
        restore them.
    """
    weights = method.exported.state_dict()
    if restore:
        weights, factors = scale_to_lengths(method.exported, weights, lengths)
    else:
        factors = length_factors(method.exported, lengths)
    kept = {k: v for k, v in weights.items() if not (heads and method.backbone.is_head(k))}
    return {**kept, **heads}, {"restored": restore, "factors": factors}


def fresh_heads(network: nn.Module) -> dict[str, Tensor]:
    """Return a new network's heads under every alias."""
    backbone = backbone_of(network)
    return {k: v for k, v in network.state_dict().items() if backbone.is_head(k)}


def method_section(method: Method, checked: Checked, filled: Sequence[str]) -> dict[str, Any]:
    """Describe method, data and origin for a checkpoint. ``filled`` tensors came from pretrained weights."""
    trained = [name for name, p in method.network.named_parameters() if p.requires_grad]
    learned = method.backbone.learned_positions()
    return {
        "format": checkpoint.FORMAT,
        "method": method.name,
        "title": method.title,
        "settings": {"common": asdict(checked.common), method.name: asdict(checked.settings)},
        "state": method.state_dict(),
        "position_grid": list(learned.grid) if learned else None,
        # a teacher is written instead of the network, under the same names
        "trained": list(dict.fromkeys([*trained, *filled])),
        "data": checked.samples.fingerprint(),
        "training_cases": checked.training_cases,
        "versions": versions(),
        "revision": revision(),
        "hardware": hardware(),
    }


def identity(
    method: type[Method],
    checked: Checked,
    dataset: str,
    configuration: str,
    fold: int | str,
    architecture: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a run and its checkpoint must share."""
    common = {k: v for k, v in asdict(checked.common).items() if k not in FREE}
    geometry = asdict(checked.geometry)
    # the architecture and the batch size below include the first two, the data's digests the last
    del geometry["strides"], geometry["batch_size"], geometry["masked"]
    if not method.crops(checked.settings, checked.geometry).fits_cases:
        del geometry["case_size"]
    return _jsonlike(
        {
            "method": method.name,
            "dataset": dataset,
            "configuration": configuration,
            "fold": fold,
            "architecture": architecture,
            "geometry": geometry,
            "batch_size": checked.batch_size,
            "settings": {**common, method.name: asdict(checked.settings)},
        }
    )


def refuse_other_run(stored: dict[str, Any], mine: dict[str, Any], source: str) -> None:
    """Refuse to continue another run's checkpoint. The UserError names the first difference of the identities."""
    difference = _first_difference(stored, mine, "")
    if difference:
        name, theirs, ours = difference
        wanted = "the cases" if name.startswith("geometry.case_size") else "the plans"  # it is that of readable cases
        raise UserError(
            f"{source} belongs to another run: {name} is {theirs!r} there and {ours!r} here. Continue with {wanted} "
            f"it was made with, or start anew without --c"
        )


def refuse_other_data(stored: dict[str, str], mine: dict[str, str], source: str) -> None:
    """Refuse to continue where cases came, went or changed.

    Cases that were or are left out as unreadable may differ: the log names them.
    """
    found = {
        "gone": [case for case in stored if case not in mine],
        "new": [case for case in mine if case not in stored],
        "changed": [case for case in mine if stored.get(case) and mine[case] and stored[case] != mine[case]],
    }
    differences = [f"{len(cases)} {what} ({shorten(cases)})" for what, cases in found.items() if cases]
    if differences:
        raise UserError(
            f"{source} was made with another state of the data set: {'; '.join(differences)}. Restore it, or start "
            f"anew without --c"
        )


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
    return None if stored == mine else (name, stored, mine)
