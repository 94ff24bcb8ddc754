"""Read configurations from plans as stock nnU-Net reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnssl_ext.errors import UserError

#: nnU-Net's record of a data set's intensities.
PROPERTIES = "foreground_intensity_properties_per_channel"


def configuration_of(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration, inherited values included.

    Raises:
        UserError: If the plans do not have it or it cannot be resolved.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # imports torch

    where = f"plans {plans.get('plans_name', '')}"
    known = plans.get("configurations")
    if not isinstance(known, Mapping):
        raise UserError(f"{where}: Expected an object 'configurations', got {type(known).__name__}. Plan again")
    if name not in known:
        raise UserError(f"{where} have no configuration '{name}'. They have {', '.join(known) or 'none'}")
    try:
        resolved = PlansManager(dict(plans)).get_configuration(name).configuration
    except Exception as error:  # a circle, a missing parent, an unknown network of old plans
        raise UserError(f"{where}, configuration '{name}' cannot be resolved: {error}") from error
    resolved.pop("inherits_from", None)
    return resolved


def configurations_3d(plans: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the 3-D configurations without cascade stages.

    Raises:
        UserError: If one cannot be resolved.
    """
    names = plans["configurations"] if isinstance(plans.get("configurations"), Mapping) else [""]
    found = {name: configuration_of(plans, name) for name in names}
    return {name: c for name, c in found.items() if "architecture" in c and not unusable(name, c, "")}


def unusable(name: str, configuration: Mapping[str, Any], purpose: str, flat: bool = False) -> str:
    """Return why a configuration is unusable, '' otherwise.

    Args:
        name: Name of the configuration.
        configuration: Its resolved content.
        purpose: Verb for the advice, such as 'pretrain'.
        flat: Whether 2-D configurations are allowed.
    """
    if not flat and len(configuration.get("patch_size", ())) != 3:
        return f"configuration '{name}' is 2-D; {purpose} 3d_fullres or 3d_lowres, which 2-D images do not have"
    if configuration.get("previous_stage") is not None:
        return (
            f"configuration '{name}' is a cascade stage, whose input holds predictions; {purpose} 3d_fullres or "
            f"3d_lowres instead"
        )
    return ""


def total_stride(configuration: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the stride per axis to the bottleneck."""
    return tuple(np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0).tolist())


def intensities_of(plans: Mapping[str, Any]) -> Any:
    """Return the intensity properties in plans. nnU-Net's first plans have another name for them."""
    return plans.get(PROPERTIES, plans.get("foreground_intensity_properties_by_modality"))
