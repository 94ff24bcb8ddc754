"""The adaptation plan leads nnU-Net's and nnssl's readers to the right tensors."""

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from torch import nn

from nnssl_ext.networks.adaptation_plan import adaptation_plan
from tests.datasets import make_plans
from tests.transfer.helpers import built, planned, primus

KEYS = {
    "architecture_plans",
    "pretrain_plan",
    "pretrain_num_input_channels",
    "architecture_kwargs",
    "recommended_downstream_patchsize",
    "key_to_encoder",
    "key_to_stem",
    "keys_to_in_proj",
    "key_to_lpe",
}


def plan_of(network: nn.Module, architecture: dict) -> dict[str, Any]:
    configuration = {**make_plans("plain")["configurations"]["3d_fullres"], "architecture": architecture}
    return adaptation_plan(
        network,
        plans_name="nnUNetPlans",
        configuration_name="3d_fullres",
        configuration=configuration,
        patch_size=(8, 8, 8),
        spacing=(1.0, 1.0, 1.0),
        channels=1,
    )


@pytest.mark.parametrize("kind", ["plain", "residual", "primus"])
def test_keys_lead_to_modules_and_tensors(kind: str) -> None:
    """As DynamicPretrainedTrainer uses them: submodules to load into, input layers to repeat, positions to resize."""
    architecture = planned("plain" if kind == "primus" else kind)
    network = primus() if kind == "primus" else built(architecture)
    plan = plan_of(network, architecture)
    assert set(plan) == KEYS
    state = network.state_dict()
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        inside = network.get_submodule(key).state_dict()
        assert {f"{key}.{name}" for name in inside} <= set(state)
        assert inside
    layers = {state[f"{layer}.weight"].data_ptr() for layer in plan["keys_to_in_proj"]}
    assert len(layers) == 1
    assert state[f"{plan['keys_to_in_proj'][0]}.weight"].shape[1] == 1
    assert (plan["key_to_lpe"] in state) == (kind == "primus")


def test_a_network_that_the_plans_do_not_name() -> None:
    architecture = planned("plain")
    with torch.device("meta"):
        sizes = {"M": (864, 16, 12), "L": (1056, 24, 16), "X": (1056, 40, 16)}
        published = {
            size: Primus(1, width, (8, 8, 8), 3, depth, heads, (16, 16, 16), scale_attn_inner=True)
            for size, (width, depth, heads) in sizes.items()
        }
    for size, network in published.items():  # L and X have the same width
        assert plan_of(network, architecture)["architecture_plans"]["arch_class_name"] == f"Primus{size}"
    assert plan_of(primus(), architecture)["architecture_plans"]["arch_class_name"] == "Primus"
    assert plan_of(built(architecture), architecture)["architecture_plans"]["arch_class_name"] == "PlainConvUNet"
