"""List settings that version 0.2 renamed or dropped, by section.

Section '' holds the settings that every method shares, section '*' those of every other section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnssl_ext.errors import UserError

RENAMED: dict[str, dict[str, str]] = {
    "": {
        "most_unreadable": "max_unreadable_fraction",
        "most_nonfinite": "max_nonfinite_batches",
    },
    "*": {
        "optimiser": "optimizer",
        "warm_up": "warmup",
        "normalise": "normalize",
        "standardise": "standardize",
    },
    "finetune": {
        "encoder_rate": "encoder_lr_scale",
        "average": "weight_average_decay",
    },
    "volume_fusion": {
        "source": "foreground_case",
        "smallest_box": "min_box_edge",
    },
    "masked_autoencoder": {
        "ratio": "mask_ratio",
        "block": "block_size",
        "normalise_target": "normalize_target",
    },
    "dino": {
        "cell_stride": "token_stride",
        "cell_weight": "patch_weight",
        "hidden": "hidden_dim",
        "bottleneck": "bottleneck_dim",
        "temperature_warm_up": "temperature_warmup",
        "centring": "centering",
        "centre_momentum": "center_momentum",
        "momentum": "teacher_momentum",
        "clip": "max_grad_norm",
        "stem_rate": "stem_lr_scale",
    },
    "contrastive_predictive_coding": {
        "columns": "max_columns",
        "voxels": "max_voxels",
        "hidden": "hidden_dims",
        "embedding": "embedding_dim",
        "width": "context_dim",
    },
    "jigsaw": {
        "puzzles": "permutations_per_window",
        "voxels": "max_voxels",
        "hidden": "hidden_dims",
        "embedding": "embedding_dim",
    },
    "relative_patch_location": {
        "neighbours": "neighbors_per_window",
        "hidden": "hidden_dims",
        "embedding": "embedding_dim",
    },
    "rotation": {
        "turns": "rotations",
        "thick_probability": "thick_slice_probability",
        "thick": "thick_slice",
        "angle": "jitter_angle",
        "hidden": "hidden_dims",
    },
    "exemplar": {
        "hidden": "hidden_dims",
        "embedding": "embedding_dim",
    },
    "variable_dimension_transform": {
        "hidden": "hidden_dim",
    },
}

#: Dropped settings, with the value that always holds now; None: it has no effect any more.
DROPPED: dict[str, dict[str, Any]] = {
    "variable_dimension_transform": {
        "depth": "rgb",
        "slices": None,
        "drift_angle": None,
        "drift_shift": None,
        "drift_zoom": None,
    },
}


def without_dropped(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out dropped settings that still hold, as earlier recipes and checkpoints have them."""
    dropped = DROPPED.get(section, {})
    return {n: v for n, v in settings.items() if n not in dropped or dropped[n] not in (None, v)}


def current_name(section: str, name: str) -> str | None:
    """Return a renamed setting's new name, else None."""
    return RENAMED.get(section, {}).get(name) or (RENAMED["*"].get(name) if section else None)


def rename_settings(settings: Mapping[str, Any], section: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Give old settings their current names.

    Args:
        settings: Content of ``nnssl_ext`` in the plans, or one section of it.
        section: Name of that section.

    Returns:
        The settings under their current names, in the same order, and each old name with its new one.

    Raises:
        UserError: If a setting stands under both names.
    """
    result: dict[str, Any] = {}
    changed: dict[str, str] = {}
    for name, value in settings.items():
        new = current_name(section, name)
        if new is not None:
            if new in settings:
                raise UserError(
                    f"expected one of the settings {name} and {new}{f' in {section}' if section else ''}, got both. "
                    f"Remove {name}, which is the old name"
                )
            changed[f"{section}.{name}".lstrip(".")] = f"{section}.{new}".lstrip(".")
        if isinstance(value, Mapping):
            value, below = rename_settings(value, f"{section}.{name}".lstrip("."))
            changed |= below
        result[new or name] = value
    return result, changed
