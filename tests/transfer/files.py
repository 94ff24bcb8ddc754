"""Files as other projects publish them, synthetic and small."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.transfer.helpers import built, noise, planned, primus


def plan(name: str, **more: Any) -> dict[str, Any]:
    """An adaptation plan with the keys that nnssl writes."""
    configuration = {"patch_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0]}
    return {
        "architecture_plans": {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"configurations": {"onemmiso": configuration}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [16, 16, 16],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
        **more,
    }


def nnssl_file(path: Path, kind: str = "residual", **more: Any) -> dict[str, Tensor]:
    """A checkpoint of nnssl; returns its weights."""
    names = {"residual": "ResEncL", "plain": "PlainConvUNet", "primus": "PrimusM"}
    keys: dict[str, Any] = {}
    if kind == "primus":
        network = noise(primus())
        keys = {"key_to_encoder": "eva", "key_to_stem": "down_projection", "key_to_lpe": "eva.pos_embed"}
        keys["pretrain_plan"] = {"configurations": {"noresample": {"patch_size": [8, 8, 8], "spacing": None}}}
    else:
        network = noise(built(planned(kind)))
        if kind == "plain":
            keys = {"key_to_stem": "encoder.stages.0"}
    weights = dict(network.state_dict())
    content = {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan(names[kind], **keys),
        "citations": [{"type": "Data", "name": "A", "bibtex_citations": ["..."]}],
        "trainer_name": "BaseMAETrainer",
        **more,
    }
    torch.save(content, path)
    return weights


def hub_folder(folder: Path) -> dict[str, Tensor]:
    """A repository as nnssl publishes them: weights, plan and configuration as files."""
    folder.mkdir(parents=True)
    weights = nnssl_file(folder / "checkpoint_final.pth")
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    (folder / "adaptation_plan.json").write_text(json.dumps(content.pop("nnssl_adaptation_plan")))
    (folder / "config.json").write_text("{}")
    torch.save(content, folder / "checkpoint_final.pth")
    return weights


def stock_file(path: Path, plans: dict, kind: str, channels: int = 1) -> dict[str, Tensor]:
    """A supervised checkpoint, with the numpy scalars that nnU-Net leaves in its log."""
    weights = dict(noise(built(planned(kind), channels)).state_dict())
    content = {
        "network_weights": weights,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.1)], "epochs": [np.int64(3)]},
        "_best_ema": np.float64(0.5),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, path)
    return weights


def resnet18(width: int = 64, stem: int = 7) -> dict[str, Tensor]:
    """A 3-D ResNet-18 by torchvision's names: basic blocks, BatchNorm, no bias, one input channel."""
    weights: dict[str, Tensor] = {}

    def layer(convolution: str, norm: str, inputs: int, outputs: int, edge: int) -> None:
        weights[f"{convolution}.weight"] = torch.randn(outputs, inputs, edge, edge, edge)
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = torch.randn(outputs), torch.randn(outputs)
        weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"] = torch.zeros(outputs), torch.ones(outputs)
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    layer("conv1", "bn1", 1, width, stem)
    inputs = width
    for number in range(1, 5):
        outputs = width * 2 ** (number - 1)
        for block in range(2):
            name = f"layer{number}.{block}"
            layer(f"{name}.conv1", f"{name}.bn1", inputs if block == 0 else outputs, outputs, 3)
            layer(f"{name}.conv2", f"{name}.bn2", outputs, outputs, 3)
            if block == 0 and inputs != outputs:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outputs, 1)
        inputs = outputs
    weights["fc.weight"], weights["fc.bias"] = torch.randn(1000, inputs), torch.randn(1000)
    return weights


def spark_file(path: Path) -> dict[str, Tensor]:
    """A checkpoint of nnssl's SparkMAE: one training step changed ``all_modules`` and not its alias ``conv``."""
    network = noise(built(planned("residual")))
    trained = {name: t + 0.5 * name.count(".all_modules.") for name, t in network.state_dict().items()}
    content = {"network_weights": trained, "nnssl_adaptation_plan": plan("ResEncL"), "trainer_name": "SparkMAETrainer"}
    torch.save(content, path)
    return trained


def as_numpy_1(file: Path, written: Path) -> None:
    """Rewrite a checkpoint as numpy 1 would have pickled its scalars: the constructor has another module's name."""
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(written, "w") as old:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
            old.writestr(name, content)
