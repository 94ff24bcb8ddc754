"""What a source's network was trained on, from the plans in its file; what cannot be understood is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nnssl_ext.transfer.names import UNet, unet_of
from nnssl_ext.transfer.source import Geometry

#: Published architectures that an adaptation plan may name without their strides: two at every stage but the first.
HALVING = ("ResEncL", "NoSkipResEncL")


def planned_geometry(plan: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Geometry:
    """The geometry that an adaptation plan tells."""
    configuration = _first(_inside(plan, "pretrain_plan", "configurations"))
    architecture = _inside(plan, "architecture_plans")
    planned = _inside(architecture, "arch_kwargs").get("strides")
    planned = planned or _inside(configuration, "architecture", "arch_kwargs").get("strides")
    patch = _inside(plan).get("pretrain_patch_size") or configuration.get("patch_size")
    return geometry(
        configuration.get("spacing"),
        planned,
        patch or plan.get("recommended_downstream_patchsize"),
        weights,
        halving=architecture.get("arch_class_name") in HALVING,
    )


def geometry(
    spacing: Any, strides: Any, patch_size: Any, weights: Mapping[str, Tensor], *, halving: bool = False
) -> Geometry:
    """A geometry from values of any kind; missing strides come from the decoder's up-sampling kernels.

    Args:
        spacing, strides, patch_size: As a file gives them.
        weights: The network's, by canonical names.
        halving: Whether, failing all else, every stage but the first has stride two.
    """
    network = unet_of(weights)
    sizes = _numbers(spacing)
    return Geometry(
        sizes if sizes and all(edge > 0 for edge in sizes) else None,
        None if network is None else _strides(network, strides, weights, halving),
        tuple(int(edge) for edge in _numbers(patch_size) or ()) or None,
    )


def _strides(
    network: UNet, given: Any, weights: Mapping[str, Tensor], halving: bool
) -> tuple[tuple[int, ...], ...] | None:
    stages = max(network.stages) + 1
    axes = next(t.ndim - 2 for n, t in weights.items() if n.startswith("encoder.") and n.endswith("conv.weight"))
    if isinstance(given, Sequence) and len(given) == stages:
        rows = [_numbers([row] * axes if isinstance(row, int) else row) for row in given]
        if all(row and len(row) == axes and min(row) >= 1 for row in rows):
            return tuple(tuple(int(step) for step in row or ()) for row in rows)
    # a decoder's up-sampling has the stride of the stage below it as its kernel
    kernels = {stage + 1: tuple(weights[f"{layer}.weight"].shape[2:]) for stage, layer in network.upsampling.items()}
    if set(kernels) == set(range(1, stages)):
        return ((1,) * axes, *(kernels[stage] for stage in range(1, stages)))
    return ((1,) * axes, *((2,) * axes for _ in range(1, stages))) if halving else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    whole = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return tuple(values) if whole else None


def _inside(content: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _first(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((value for value in content.values() if isinstance(value, Mapping)), {})
