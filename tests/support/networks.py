"""Small networks of all kinds."""

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from tests.datasets import OWN_NETWORKS, architecture

KINDS = ["plain", "residual", "anisotropic", *OWN_NETWORKS]


def network(kind: str, channels: int = 1, outputs: int = 3) -> nn.Module:
    plan = architecture(kind)
    return get_network_from_plans(
        plan["network_class_name"],
        plan["arch_kwargs"],
        plan["_kw_requires_import"],
        channels,
        outputs,
        deep_supervision=True,
    )
