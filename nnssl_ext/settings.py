"""Settings: declared as dataclasses, checked by name and by type, read from the plans.

A schema is a frozen dataclass whose fields are made with ``setting(...)``; a field may itself be such a dataclass.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from nnssl_ext.errors import UserError

PLANS_KEY = "nnssl_ext"

#: Arithmetic of a network in training.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")

Schema = TypeVar("Schema")


def setting(
    default: Any,
    doc: str,
    *,
    source: str = "",
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
) -> Any:
    """Declare one setting.

    Args:
        default: Its value when the plans do not name it; lists are copied.
        doc: One sentence with units, shown in docs/plans.md.
        source: The paper or the reason the default comes from.
        choices: The only values allowed.
        low, high: Inclusive limits of a number, or of every number of a list.
        length: Number of entries of a list.
    """
    metadata = {"doc": doc, "source": source, "choices": choices, "low": low, "high": high, "length": length}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CommonSettings:
    """Settings that every method shares."""

    epochs: int = setting(400, "Epochs of pretraining.", source="100,000 steps: VolumeFusion's 1k-volume run", low=1)
    iterations_per_epoch: int = setting(250, "Optimiser steps an epoch.", source="nnU-Net", low=1)
    validation_iterations: int = setting(25, "Validation batches after each epoch; always the same crops.", low=1)
    batch_size: int | None = setting(None, "Samples a step over all GPUs; null takes the plan's.", low=1)
    crop_size: list[int] | None = setting(None, "Crop edges in voxels; null takes the plan's patch.", low=1, length=3)
    learning_rate: float | None = setting(None, "Peak learning rate; null takes the method's.", low=0)
    seed: int = setting(0, "Seed of every random draw, the network's initial values included.", low=0)
    save_every: int = setting(5, "Epochs between two checkpoint_latest.pth.", low=1)
    precision: str = setting(
        "auto",
        "Of the network's arithmetic; auto is bfloat16 where the hardware has it, float16 on older GPUs, else float32.",
        choices=PRECISIONS,
    )
    memory_format: str = setting(
        "auto",
        "How convolutions lay their channels out in memory; auto is channels_last where it was measured to be faster: "
        "in bfloat16 on CPUs.",
        choices=("auto", "contiguous", "channels_last"),
    )
    activation_checkpointing: bool = setting(
        False, "Compute the network's blocks again in the backward pass: less memory, about a third more computation."
    )
    start_from: str | None = setting(
        None, "checkpoint_final.pth of a run of the same method and network, possibly with another crop, to go on from."
    )
    images: str | None = setting(
        None, "Folder of labelled 2-D images, CLASS/IMAGE.png or .jpg, for methods that learn from such."
    )
    most_unreadable: float = setting(
        0.05, "Share of unreadable cases or images above which a run stops; fewer are left out.", low=0, high=1
    )
    most_nonfinite: int = setting(10, "Batches with a non-finite objective that a run skips before it stops.", low=0)
    max_time: float | None = setting(
        None, "Hours after which a run ends by itself with a checkpoint; null is never.", low=1e-6
    )
    on_write_failure: str = setting(
        "stop",
        "What becomes of a run whose checkpoint cannot be written: stop, or go_on and try again at the next one.",
        choices=("stop", "go_on"),
    )
    write_in_background: bool = setting(
        True, "Write checkpoints while the training goes on; false needs a copy of the state less in the host's memory."
    )
    target_trainer: str = setting("nnUNetTrainer", "The trainer whose network is pretrained: it builds it.")


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of ``nnsslTrainer_Finetune``: a segmentation training, with or without pretrained weights."""

    seed: int = setting(0, "Seed of initial values, cases, crops and augmentation; each fold has its own.", low=0)
    steps: int = setting(250_000, "Optimiser steps.", source="nnU-Net: 1,000 epochs of 250", low=1)
    steps_per_epoch: int = setting(250, "Optimiser steps between two online validations.", source="nnU-Net", low=1)
    validation_iterations: int = setting(
        50, "Batches of an online validation; always the same crops.", source="nnU-Net", low=1
    )
    save_every: int = setting(50, "Epochs between two checkpoint_latest.pth.", source="nnU-Net", low=1)
    snapshots: list[int] = setting(
        [], "Steps after which the weights are kept and, at the end, validated.", source="none in nnU-Net", low=1
    )
    optimiser: str = setting("sgd", "Optimiser; sgd is nnU-Net's.", source="nnU-Net", choices=("sgd", "adamw"))
    learning_rate: float | None = setting(None, "Peak rate; null is 0.01 for sgd, 0.001 for adamw.", low=0)
    weight_decay: float = setting(3e-5, "Weight decay.", source="nnU-Net", low=0)
    schedule: str = setting(
        "poly", "How the rate falls, step by step.", source="nnU-Net", choices=("constant", "poly", "cosine")
    )
    warm_up: int = setting(0, "Steps with a linearly rising rate.", source="none in nnU-Net", low=0)
    encoder_rate: float = setting(1.0, "The encoder's rate as a multiple of the others'.", low=0)
    head_only_steps: int = setting(0, "First so many steps train the segmentation heads alone.", low=0)
    freeze_encoder_steps: int = setting(0, "First so many steps leave the encoder as it is.", low=0)
    average: float = setting(
        0.0, "Decay of the moving average of the weights that is validated and written; 0: none.", low=0, high=0.99999
    )
    precision: str = setting(
        "stock",
        "stock is float16 on GPUs and float32 elsewhere; auto as for pretraining.",
        source="nnU-Net",
        choices=("stock", *PRECISIONS),
    )
    mirroring: bool = setting(True, "Mirror when snapshots are validated, as nnU-Net does.", source="nnU-Net")


def check_settings(schema: type[Schema], given: Any, where: str, prefix: str = "") -> Schema:
    """Build ``schema`` from plain JSON values.

    Args:
        schema: A dataclass of settings.
        given: Mapping of setting names to values; names left out keep their defaults.
        where: The file the values come from, for error messages.
        prefix: Dotted name of the section, with its trailing dot.

    Raises:
        UserError: For an unknown name (with the nearest known one), a wrong type or a value out of its limits.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: section '{prefix.rstrip('.')}' must be an object of settings, got {given!r}")
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(unknown_name("setting", prefix + str(name), [prefix + k for k in known], where))
        values[name] = _check_value(hints[name], value, known[name].metadata, prefix + name, where)
    return schema(**values)


def split_sections(given: Any, schemas: Mapping[str, type], where: str) -> tuple[CommonSettings, dict[str, Any]]:
    """Check the whole ``nnssl_ext`` section of a plans file: the common settings and every method's section.

    Returns:
        The common settings, and for each name in ``schemas`` its checked settings.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: '{PLANS_KEY}' must be an object of settings, got {given!r}")
    common_names = [f.name for f in fields(CommonSettings)]
    for name in given:
        if name not in schemas and name not in common_names:
            raise UserError(unknown_name("setting", str(name), [*common_names, *schemas], where))
    common = check_settings(CommonSettings, {k: v for k, v in given.items() if k not in schemas}, where)
    return common, {name: check_settings(s, given.get(name, {}), where, f"{name}.") for name, s in schemas.items()}


def unknown_name(kind: str, got: str, known: list[str], where: str) -> str:
    """The error line for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where}: unknown {kind} '{got}'; {hint}"


def _check_value(hint: Any, value: Any, limits: Mapping[str, Any], name: str, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (kind,) = (option for option in options if option is not type(None))
    if hasattr(kind, "__dataclass_fields__"):
        return check_settings(kind, value, where, f"{name}.")
    if typing.get_origin(kind) is list:
        return _check_list(kind, value, limits, name, where)
    return _check_scalar(kind, value, limits, name, where)


def _check_list(kind: Any, value: Any, limits: Mapping[str, Any], name: str, where: str) -> list:
    (item,) = typing.get_args(kind)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: setting '{name}' must be a list of {item.__name__}, got {value!r}")
    if limits.get("length") and len(value) != limits["length"]:
        raise UserError(f"{where}: setting '{name}' must have {limits['length']} entries, got {list(value)!r}")
    return [_check_scalar(item, entry, limits, name, where) for entry in value]


def _check_scalar(kind: type, value: Any, limits: Mapping[str, Any], name: str, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: setting '{name}' must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if limits.get("choices") and value not in limits["choices"]:
        raise UserError(f"{where}: setting '{name}' must be one of {', '.join(limits['choices'])}, got {value!r}")
    low: Any = limits.get("low")
    high: Any = limits.get("high")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise UserError(f"{where}: setting '{name}' must be a finite number, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise UserError(f"{where}: setting '{name}' must be {limit}, got {value!r}")
    return value


def settings_table(schema: type, prefix: str = "") -> list[str]:
    """The rows of a Markdown table of a schema's settings: name, type, default, what it is, where it comes from."""
    hints = typing.get_type_hints(schema)
    rows = []
    for entry in fields(schema):
        hint, name = hints[entry.name], f"{prefix}{entry.name}"
        if hasattr(hint, "__dataclass_fields__"):
            rows += settings_table(hint, f"{name}.")
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        kind = str(hint).replace("<class '", "").replace("'>", "").replace(" | None", " or null")
        choices = entry.metadata["choices"]
        kind = " / ".join(choices) if choices else kind
        shown = json.dumps(default)
        rows.append(
            f"| `{name}` | {kind} | `{shown}` | {entry.metadata['doc']} | {entry.metadata['source'] or 'ours'} |"
        )
    return rows
