"""Build the adaptation plan for nnU-Net and nnssl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

#: Primus is built by its trainers, not by plans. Published sizes: width of the tokens and number of blocks -> name.
PRIMUS_SIZES = {(396, 12): "S", (792, 12): "B", (864, 16): "M", (1056, 24): "L", (1056, 40): "X"}


def adaptation_plan(
    network: nn.Module,
    *,
    plans_name: str,
    configuration_name: str,
    configuration: Mapping[str, Any],
    patch_size: Sequence[int],
    spacing: Sequence[float],
    channels: int,
    intensities: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the content of ``nnssl_adaptation_plan``.

    The network was built from the configuration. Its training crops have ``patch_size`` voxels of ``spacing`` mm.
    ``intensities`` are the plans' properties that CTNormalization reads.
    """
    architecture = _architecture(network, configuration["architecture"])
    return {
        "architecture_plans": architecture,
        "pretrain_plan": {
            "plans_name": plans_name,
            "configurations": {
                configuration_name: {**configuration, "patch_size": list(patch_size), "spacing": list(spacing)}
            },
            "foreground_intensity_properties_per_channel": intensities,
        },
        "pretrain_num_input_channels": channels,
        # nnU-Net's DynamicPretrainedTrainer takes 3x3x3 kernels for granted where this is not said
        "architecture_kwargs": architecture["arch_kwargs"],
        "recommended_downstream_patchsize": list(patch_size),
        "key_to_encoder": getattr(network, "key_to_encoder", "encoder.stages"),
        "key_to_stem": getattr(network, "key_to_stem", "encoder.stem"),
        "keys_to_in_proj": list(getattr(network, "keys_to_in_proj", ())),
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }


def _architecture(network: nn.Module, planned: Mapping[str, Any]) -> dict[str, Any]:
    name = planned["network_class_name"].rsplit(".", 1)[-1]
    kwargs, requiring_import = planned["arch_kwargs"], planned["_kw_requires_import"]
    own = type(network).__name__
    if own != name and hasattr(network, "key_to_encoder"):  # a trainer that builds something else than the plans say
        name, kwargs, requiring_import = f"{own}{_primus_size(network)}", {}, []
    return {"arch_class_name": name, "arch_kwargs": kwargs, "arch_kwargs_requiring_import": requiring_import}


def _primus_size(network: nn.Module) -> str:
    """Name a published size of Primus, else ''."""
    blocks: Any = getattr(getattr(network, "eva", None), "blocks", ())
    return PRIMUS_SIZES.get((getattr(network, "embed_dim", 0), len(blocks)), "")
