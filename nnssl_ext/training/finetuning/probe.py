"""Train a linear voxel-wise head on a frozen encoder.

It is trained, validated and loaded like ``nnsslTrainer_Finetune``. Its network is the target's encoder with one 1x1x1
convolution per stage, whose logits are interpolated to full resolution and summed.

B batch, C classes, D H W voxels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.nn import functional as F

from nnssl_ext.errors import UserError
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.networks.target import target_network
from nnssl_ext.settings import UNPROTECTED, CommonSettings
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune


class ProbeNetwork(nn.Module):
    """A frozen encoder and its linear head.

    All of the segmentation network but its decoder is taken over, under the same names.
    """

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.backbone_view = backbone_of(network)
        network.requires_grad_(False)
        for name, module in network.named_children():
            if name != "decoder" and not self.backbone_view.is_head(f"{name}."):
                self.add_module(name, module)
        self.decoder = LinearHead(self.backbone_view.channels, outputs)

    def train(self, mode: bool = True) -> ProbeNetwork:
        super().train(mode)
        self.backbone_view.network.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Predict logits: (B, channels, D, H, W) -> (B, C, D, H, W)."""
        with torch.no_grad():
            features = self.backbone_view.features(image)
        return self.decoder(features, image.shape[2:])


class LinearHead(nn.Module):
    """Predict logits from the features of all stages. Its name keeps nnU-Net from loading it."""

    #: nnU-Net switches it, though there is only one output.
    deep_supervision = False

    def __init__(self, channels: list[int], outputs: int) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, outputs, 1) for width in channels)

    def forward(self, features: list[Tensor], size: torch.Size) -> Tensor:
        """Predict logits (B, C, *size) from features, finest first."""
        total: Any = 0
        for layer, feature in zip(self.seg_layers, features, strict=True):
            # linear maps and interpolation commute: interpolating logits is cheaper than features
            total = total + F.interpolate(layer(feature), size=tuple(size), mode="trilinear", align_corners=False)
        return total


class nnsslTrainer_Probe(nnsslTrainer_Finetune):
    """Train a linear head on the frozen target encoder."""

    #: Its head reads the encoder, so a head that reads a decoder does not fit.
    takes_heads = False

    def check(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device
    ) -> tuple[CommonSettings, str]:
        if len(PlansManager(plans).get_configuration(configuration).patch_size) != 3:
            raise UserError(f"configuration '{configuration}' is 2-D. The probe is 3-D: use 3d_fullres or 3d_lowres")
        found = super().check(plans, configuration, fold, dataset_json, device)
        # the encoder is frozen anyway, and a fine-tuning's schedule is not the probe's
        self.settings = replace(self.settings, **UNPROTECTED)
        return found

    def set_up(self) -> None:
        super().set_up()
        self.enable_deep_supervision = False
        self.predicted_by = type(self).__name__

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the probe on the target trainer's encoder."""
        network = target_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return ProbeNetwork(network, num_output_channels)
