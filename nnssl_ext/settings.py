"""Declare settings as dataclasses and check values.

A schema is a frozen dataclass. Its fields are made with ``setting(...)`` or are schemas themselves.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from nnssl_ext.errors import UserError
from nnssl_ext.renamed import current_name, without_dropped

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
        default: Value if the plans do not name the setting. Lists are copied.
        doc: One sentence with units, shown to users.
        source: Paper or reason behind the default.
        choices: Allowed values.
        low, high: Inclusive limits of a number, or of each number in a list.
        length: Number of entries in a list. Two that cannot be None are a range, the lower end first.
    """
    metadata = {"doc": doc, "source": source, "choices": choices, "low": low, "high": high, "length": length}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CommonSettings:
    """Settings that every method shares."""

    epochs: int = setting(400, "Epochs of pretraining.", source="100,000 steps: VolumeFusion's 1k-volume run", low=1)
    iterations_per_epoch: int = setting(250, "Optimizer steps per epoch.", source="nnU-Net", low=1)
    validation_iterations: int = setting(
        25, "Validation batches after each epoch. The crops are always the same.", low=1
    )
    batch_size: int | None = setting(None, "Samples per step over all GPUs. null: the plan's.", low=1)
    crop_size: list[int] | None = setting(None, "Crop edges in voxels. null: the plan's patch.", low=1, length=3)
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. null: 0.002 sqrt(batch / 1024) for 3DINO, 0.0003 for exemplar and on vision transformers "
        "and Primus, else 0.001.",
        low=0,
    )
    seed: int = setting(0, "Seed of all random draws, initial weights included.", low=0)
    save_every: int = setting(5, "Epochs between two writes of checkpoint_latest.pth.", low=1)
    pretext_picture_every: int = setting(
        10,
        "Epochs between two drawings of pretext.png: input, target and prediction of a sample. 0: none.",
        low=0,
    )
    precision: str = setting(
        "auto",
        "Arithmetic of the network. auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32.",
        choices=PRECISIONS,
    )
    memory_format: str = setting(
        "auto",
        "Memory layout of convolution weights. auto: channels_last where it was measured to be faster, "
        "which is bfloat16 on CPUs.",
        choices=("auto", "contiguous", "channels_last"),
    )
    activation_checkpointing: bool = setting(
        False, "Recompute the network's blocks in the backward pass: less memory, about a third more computation."
    )
    start_from: str | None = setting(
        None,
        "Weights to start from, as nnssl_ext transfer takes them. A run of the same method hands over its heads too.",
    )
    images: str | None = setting(
        None, "Folder of labeled 2-D images, CLASS/IMAGE.png or .jpg, for methods that learn from them."
    )
    max_unreadable_fraction: float = setting(
        0.05, "Stop if a larger fraction of cases or images is unreadable. Fewer are left out.", low=0, high=1
    )
    max_nonfinite_batches: int = setting(10, "Batches with a non-finite objective that are skipped at most.", low=0)
    max_time: float | None = setting(None, "Hours until a run stops with a checkpoint. null: no limit.", low=1e-6)
    on_write_failure: str = setting(
        "stop",
        "If a checkpoint cannot be written: stop, or go_on and try again at the next one.",
        choices=("stop", "go_on"),
    )
    write_in_background: bool = setting(
        True, "Write checkpoints while training goes on. false: needs one copy of the state less in host memory."
    )
    keep_host_memory: bool = setting(
        True, "On the CPU: keep freed memory, in huge pages, instead of returning it to the system after each step."
    )
    restore_weight_lengths: bool = setting(
        False,
        "Scale convolutions before a norm to their initial length in the weights for fine-tuning. Runs continue with "
        "the trained lengths.",
        source="longer weights, equal in function, learn more slowly; with AdamW two of three studies gained",
    )
    target_trainer: str = setting("nnUNetTrainer", "Trainer that builds the network to pretrain.")


#: Values that switch the protection of pretrained weights off.
UNPROTECTED: dict[str, Any] = {
    "head_only_steps": 0,
    "freeze_encoder_steps": 0,
    "encoder_lr_scale": 1.0,
    "layer_decay": 1.0,
}


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of ``nnsslTrainer_Finetune``."""

    seed: int = setting(0, "Seed of initial weights, cases, crops and augmentation. Each fold derives its own.", low=0)
    steps: int = setting(250_000, "Optimizer steps.", source="nnU-Net: 1,000 epochs of 250", low=1)
    steps_per_epoch: int = setting(250, "Optimizer steps between two online validations.", source="nnU-Net", low=1)
    validation_iterations: int = setting(
        50, "Batches per online validation. The crops are always the same.", source="nnU-Net", low=1
    )
    save_every: int = setting(50, "Epochs between two writes of checkpoint_latest.pth.", source="nnU-Net", low=1)
    snapshots: list[int] = setting(
        [], "Steps after which the weights are kept. They are validated at the end.", source="none in nnU-Net", low=1
    )
    optimizer: str = setting("sgd", "Optimizer. nnU-Net uses sgd.", source="nnU-Net", choices=("sgd", "adamw"))
    learning_rate: float | None = setting(None, "Peak learning rate. null: 0.01 for sgd, 0.001 for adamw.", low=0)
    weight_decay: float = setting(3e-5, "Weight decay.", source="nnU-Net", low=0)
    schedule: str = setting(
        "poly", "Learning rate schedule, per step.", source="nnU-Net", choices=("constant", "poly", "cosine")
    )
    warmup: float = setting(
        0, "Steps of linear learning rate warmup. Below 1: a share of all steps.", source="none in nnU-Net", low=0
    )
    encoder_lr_scale: float = setting(1.0, "Factor of the encoder's learning rate.", low=0)
    layer_decay: float = setting(
        1.0, "Factor of the learning rate from each encoder layer to the one before it.", source="BEiT", low=0.1, high=1
    )
    plain_norms: bool = setting(False, "Exempt norms and biases from weight decay.", source="usual for transformers")
    head_only_steps: float = setting(0, "First steps that train only the heads. Below 1: a share of all steps.", low=0)
    freeze_encoder_steps: float = setting(0, "First steps with a frozen encoder. Below 1: a share of all steps.", low=0)
    restart_schedule: bool = setting(
        False, "Restart warmup and schedule when frozen components are released (sawtooth).", source="OpenMind"
    )
    weight_average_decay: float = setting(
        0.0, "Decay of the weight average that is validated and written. 0: no average.", low=0, high=0.99999
    )
    precision: str = setting(
        "stock",
        "Arithmetic of training, validation batches on GPUs, and snapshots; other predictions are stock's. stock: "
        "float16 on GPUs, float32 elsewhere. auto: as in pretraining.",
        source="nnU-Net",
        choices=("stock", *PRECISIONS),
    )
    mirroring: bool = setting(True, "Mirror when snapshots are validated.", source="nnU-Net")


def check_settings(schema: type[Schema], given: Any, where: str, prefix: str = "") -> Schema:
    """Build ``schema`` from plain JSON values.

    Args:
        schema: Dataclass of settings.
        given: Values by setting name. Missing settings keep their defaults.
        where: Source of the values, for messages.
        prefix: Dotted name of the section, with its trailing dot.

    Raises:
        UserError: For an unknown or renamed setting, a wrong type, or a value outside its limits.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: section '{prefix.rstrip('.')}' must be an object of settings, got {given!r}")
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in without_dropped(prefix.rstrip("."), given).items():
        if name not in known:
            raise UserError(_unknown_setting(prefix, str(name), list(known), where))
        values[name] = _check_value(hints[name], value, known[name].metadata, prefix + name, where)
    return schema(**values)


def split_sections(given: Any, schemas: Mapping[str, type], where: str) -> tuple[CommonSettings, dict[str, Any]]:
    """Check all settings of a plans file.

    Returns:
        The common settings, and the checked settings of each name in ``schemas``.

    Raises:
        UserError: As ``check_settings``.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: '{PLANS_KEY}' must be an object of settings, got {given!r}")
    common_names = [f.name for f in fields(CommonSettings)]
    for name in given:
        if name not in schemas and name not in common_names:
            raise UserError(_unknown_setting("", str(name), [*common_names, *schemas], where))
    common = check_settings(CommonSettings, {k: v for k, v in given.items() if k not in schemas}, where)
    return common, {name: check_settings(s, given.get(name, {}), where, f"{name}.") for name, s in schemas.items()}


def unknown_name(kind: str, got: str, known: list[str], where: str) -> str:
    """Return the error for an unknown name, with a hint."""
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where}: unknown {kind} '{got}'; {hint}"


def _unknown_setting(prefix: str, name: str, known: list[str], where: str) -> str:
    new = current_name(prefix.rstrip("."), name)
    if new in known:
        return (
            f"{where}: setting '{prefix}{name}' is called '{prefix}{new}' since version 0.2. Rename it, or let "
            f"nnssl_ext plan --rename-settings FILE do so"
        )
    return unknown_name("setting", prefix + name, [prefix + k for k in known], where)


def _check_value(hint: Any, value: Any, limits: Mapping[str, Any], name: str, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (kind,) = (option for option in options if option is not type(None))
    if hasattr(kind, "__dataclass_fields__"):
        return check_settings(kind, value, where, f"{name}.")
    if typing.get_origin(kind) is list:
        entries = _check_list(kind, value, limits, name, where)
        if limits.get("length") == 2 and type(None) not in options and entries[0] > entries[1]:
            raise UserError(f"{where}: setting '{name}' must be a range from low to high, got {entries!r}")
        return entries
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
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: setting '{name}' must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if limits.get("choices") and value not in limits["choices"]:
        raise UserError(f"{where}: setting '{name}' must be one of {', '.join(limits['choices'])}, got {value!r}")
    low: Any = limits.get("low")
    high: Any = limits.get("high")
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:  # an integer may be beyond float
        raise UserError(f"{where}: setting '{name}' must be a finite number, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise UserError(f"{where}: setting '{name}' must be {limit}, got {value!r}")
    return value


def settings_table(schema: type, prefix: str = "") -> list[str]:
    """Return a Markdown table of settings."""
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
