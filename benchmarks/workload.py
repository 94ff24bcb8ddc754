"""Write the data sets and plans that benchmarks run on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pydoc
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from benchmarks.checkout import trainer_name

DATASET = "Dataset899_Benchmark"
DATA = "nnUNetPlans_3d_fullres"
CONFIGURATION = "3d_fullres"

#: Patch, batch, channels of the stages, strides; and blocks of a residual encoder. "hippocampus" is what nnU-Net plans
#: for Task04, "residual" its ResEnc-L for large isotropic volumes.
PLANS: dict[str, dict] = {
    "tiny": {"patch": [16, 16, 16], "batch": 2, "features": [4, 8, 12], "strides": [[1, 1, 1], *[[2, 2, 2]] * 2]},
    "hippocampus": {
        "patch": [40, 56, 40],
        "batch": 9,
        "features": [32, 64, 128, 256],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    },
    "counted": {
        "patch": [64, 64, 64],
        "batch": 2,
        "features": [4, 8, 16, 16, 16],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
    },
    "plain96": {
        "patch": [96, 96, 96],
        "batch": 2,
        "features": [32, 64, 128, 256, 320],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
    },
    "residual128": {
        "patch": [128, 128, 128],
        "batch": 2,
        "features": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
        "blocks": [1, 3, 4, 6, 6, 6],
    },
}


def volume(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a normalized body with texture, about as compressible as medical images."""
    smooth = gaussian_filter(generator.standard_normal([max(2, n // 4) for n in shape]), 2)
    repeated = smooth
    for axis, length in enumerate(shape):
        repeated = repeated.take(np.arange(length) * smooth.shape[axis] // length, axis)
    image = np.rint(400 * repeated / repeated.std() + 25 * generator.standard_normal(shape, dtype=np.float32))
    return ((image - image.mean()) / image.std()).astype(np.float32)


def write_cases(folder: Path, shape: tuple[int, ...], cases: int, patch: list[int]) -> None:
    """Write preprocessed cases with nnU-Net's chunks and blocks for the patch."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    blocks, chunks = comp_blosc2_params((1, *shape), tuple(patch), 4)
    for case in range(cases):
        nnUNetDatasetBlosc2.save_case(
            volume(generator, shape)[None],
            np.zeros((1, *shape), np.int8),
            {"class_locations": {}},
            str(folder / f"case_{case:02d}"),
            chunks,
            blocks,
        )


#: Our own networks at the sizes of their recipes, and small.
VIT = {"strides": [[1, 1, 1], *[[2, 2, 2]] * 4], "mlp_ratio": 4.0, "layer_scale": 1e-5, "drop_path": 0.3}
PLANS |= {
    "pct_net": {
        "patch": [128, 128, 128],
        "batch": 2,
        "network": "pct_net.PCTNet",
        "kwargs": {
            "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
            "features_per_stage": [24, 48, 128, 256, 512],
            "drop_path": 0.2,
            "mask_padding": True,
        },
    },
    "vit_large": {
        "patch": [96, 96, 96],
        "batch": 2,
        "network": "vit.ViTUNETR",
        "kwargs": {
            **VIT,
            "embed_dim": 1024,
            "depth": 24,
            "num_heads": 16,
            "position_grid": [7, 7, 7],
            "checkpointing": True,
        },
    },
}

#: Tiny data sets of the record, by nnU-Net's number.
NUMBERS = {"plain": 891, "residual": 892, "anisotropic": 893, "vit": 894, "pct_net": 895}
TINY: dict[str, dict] = {
    "plain": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "residual": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "blocks": [1, 2, 2]},
    "anisotropic": {
        "patch": [8, 24, 24],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "spacing": [5.0, 1.0, 1.0],
        "channels": 2,
    },
    "vit": {
        "network": "vit.ViTUNETR",
        "kwargs": {
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "position_grid": [3, 3, 3],
            "decoder_features": 4,
        },
    },
    "pct_net": {
        "patch": [8, 32, 32],
        "spacing": [5.0, 1.0, 1.0],
        "network": "pct_net.PCTNet",
        "kwargs": {
            "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
            "features_per_stage": [4, 4, 8, 8, 16],
            "heads": [2, 2, 4],
            "window": 2,
        },
    },
}


PLANS |= {f"tiny_{kind}": {"patch": [16, 16, 16], "batch": 2, **TINY[kind]} for kind in ("vit", "pct_net")}


def dataset_name(kind: str) -> str:
    """Return the name of a tiny data set."""
    return f"Dataset{NUMBERS[kind]}_{kind.replace('_', '').title()}"


def tiny_plans(kind: str) -> dict:
    """Return nnU-Net's plans of a tiny data set, with networks of a few channels."""
    chosen = {"patch": [16, 16, 16], "features": [4, 8, 12], **TINY[kind]}
    plans = _plans(chosen, 2)
    return {**plans, "dataset_name": dataset_name(kind)}


def write_tiny(root: Path, kind: str, cases: int = 8) -> Path:
    """Write a tiny data set with two labels, preprocessed by nnU-Net's own code.

    Args:
        root: An nnU-Net environment with the folders raw, preprocessed and results.
        kind: A name of ``TINY``.
        cases: How many cases.
    """
    folder = root / "preprocessed" / dataset_name(kind)
    plans, channels = tiny_plans(kind), TINY[kind].get("channels", 1)
    spacing = TINY[kind].get("spacing", [1.0, 1.0, 1.0])
    shape = (9, 34, 32) if spacing[0] > 1 else (20, 24, 22)
    content = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": {"background": 0, "organ": 1, "tumor": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    for part in (DATA, "gt_segmentations", "imagesTr"):
        (folder / part).mkdir(parents=True)
    preprocessor, manager = DefaultPreprocessor(verbose=False), PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    for case in range(cases):
        images, truth = labeled_body(np.random.default_rng(case), shape, channels)
        files = [str(folder / "imagesTr" / f"case_{case:02d}_{channel:04d}.nii.gz") for channel in range(channels)]
        label = str(folder / "gt_segmentations" / f"case_{case:02d}.nii.gz")
        for array, file in zip((*images, truth), (*files, label), strict=True):
            nibabel.save(nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1.0])), file)  # x, y, z
        preprocessor.run_case_save(
            str(folder / DATA / f"case_{case:02d}"), files, label, manager, configuration, content
        )
    for name, value in (("nnUNetPlans", plans), ("dataset", content), ("dataset_fingerprint", {})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def labeled_body(
    generator: np.random.Generator, shape: tuple[int, ...], channels: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return images of a body with an organ (1) and a tumor (2), one per channel, and the labels."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    center = generator.uniform(-0.25, 0.25, 3)
    distance = sum((a - c) ** 2 for a, c in zip(axes, center, strict=True))
    truth = (distance < 0.55**2).astype(np.uint8) + (distance < 0.3**2)
    body = sum(a**2 for a in axes) < 0.9
    clean = body + 0.8 * (truth == 1) - 0.8 * (truth == 2)
    return [(clean + 0.3 * generator.standard_normal(shape)).astype(np.float32) for _ in range(channels)], truth


def write_images(folder: Path) -> None:
    """Write a labeled set of 2-D images: two classes of stripes, four images each."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("flat", "striped")):
        (folder / name).mkdir(parents=True)
        for image in range(4):
            pixels = 128 + 20 * generator.standard_normal((48, 48)) + 60 * number * np.sin(np.arange(48))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{image}.png")


def write_sources(folder: Path) -> list[Path]:
    """Write six pretrained files filled with noise, as other projects publish them."""
    kinds = ("plain", "residual", "anisotropic", "vit")
    files = [folder / f"stock_{kind}.pth" for kind in kinds]
    for kind, file in zip(kinds, files, strict=True):
        arguments = {"plans": tiny_plans(kind), "configuration": "3d_fullres", "fold": 0}
        weights = _noise(_network(kind).state_dict())
        torch.save({"network_weights": weights, "init_args": arguments, "trainer_name": "nnUNetTrainer"}, file)
    plan = {
        "architecture_plans": {
            "arch_class_name": "ResEncL",
            "arch_kwargs": None,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [16] * 3, "spacing": [1.0] * 3}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [16] * 3,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
    weights = _noise(_network("residual").state_dict())
    nnssl = {"network_weights": weights, "nnssl_adaptation_plan": plan, "trainer_name": "BaseMAETrainer"}
    torch.save(nnssl, folder / "nnssl_residual.pth")
    torch.save({"state_dict": _noise(_resnet18(8, 3))}, folder / "resnet.pth")
    return [*files, folder / "nnssl_residual.pth", folder / "resnet.pth"]


def _network(kind: str) -> nn.Module:
    plans = PlansManager(tiny_plans(kind)).get_configuration("3d_fullres")
    return get_network_from_plans(
        plans.network_arch_class_name,
        plans.network_arch_init_kwargs,
        plans.network_arch_init_kwargs_req_import,
        TINY[kind].get("channels", 1),
        3,
        deep_supervision=True,
    )


def _noise(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for value in weights.values():
        if value.is_floating_point():
            value.normal_(generator=generator)  # in place: names of one tensor stay equal
    return weights


def _resnet18(width: int, stem: int) -> dict[str, Tensor]:
    """Return a 3-D ResNet-18's empty tensors by torchvision's names."""
    weights: dict[str, Tensor] = {}

    def layer(convolution: str, norm: str, inputs: int, outputs: int, edge: int) -> None:
        weights[f"{convolution}.weight"] = torch.empty(outputs, inputs, edge, edge, edge)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{name}"] = torch.empty(outputs)
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
    return weights


def write_dataset(
    root: Path,
    plan: str,
    settings: dict,
    *,
    cases: int = 4,
    batch: int | None = None,
    shape: tuple[int, ...] = (),
    written: Path | None = None,
) -> Path:
    """Write an nnU-Net environment with one preprocessed data set, and set nnU-Net's variables to it.

    Args:
        root: An empty folder.
        plan: A name of ``PLANS``.
        settings: The section ``nnssl_ext`` of the plans.
        cases: How many cases.
        batch: Batch size; None for the plan's.
        shape: Of a case; empty for a half more than the patch.
        written: A data set of the same plan whose cases are taken.
    """
    root.mkdir(parents=True, exist_ok=True)
    variables = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    for name, part in variables.items():
        (root / part).mkdir(parents=True)
        os.environ[name] = str(root / part)
    chosen = PLANS[plan]
    folder = root / "preprocessed" / DATASET
    if written is None:
        write_cases(folder / DATA, shape or tuple(3 * n // 2 for n in chosen["patch"]), cases, chosen["patch"])
    else:
        shutil.copytree(written / DATA, folder / DATA, copy_function=os.link)
    plans = {**_plans(chosen, batch or chosen["batch"]), "nnssl_ext": settings}
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": cases}
    for name, value in (("nnUNetPlans", plans), ("dataset", {**content, "file_ending": ".nii.gz"})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def _architecture(chosen: dict) -> dict:
    if "network" in chosen:
        return {
            "network_class_name": _own_network(chosen["network"]),
            "arch_kwargs": chosen["kwargs"],
            "_kw_requires_import": [],
        }
    stages = len(chosen["features"])
    kwargs = {
        "n_stages": stages,
        "features_per_stage": chosen["features"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": chosen.get("kernels", [[3, 3, 3]] * stages),
        "strides": chosen["strides"],
        "n_conv_per_stage_decoder": [1 if "blocks" in chosen else 2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    kwargs |= {"n_blocks_per_stage": chosen["blocks"]} if "blocks" in chosen else {"n_conv_per_stage": [2] * stages}
    network = "ResidualEncoderUNet" if "blocks" in chosen else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
    }


def start_trainer(folder: Path, method: str, device: torch.device, run: str = "results") -> Any:
    """Start a pretraining and return its trainer before the first step.

    Args:
        folder: Preprocessed data set, as ``write_dataset`` returns it.
        method: Name of the method.
        device: Where it trains.
        run: Name of the results folder; another one for each trainer of the same method.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    os.environ["nnUNet_results"] = str(folder.parent.parent / run)
    plans, content = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    with contextlib.redirect_stdout(io.StringIO()):
        kind = recursive_find_trainer_class_by_name(trainer_name(method))
        trainer = kind({**plans, "continue_training": False}, CONFIGURATION, "all", content, device)
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
    return trainer


def _own_network(name: str) -> str:
    """Return the dotted path of our network. Version 0.1 had no folder ``architectures``."""
    folders = ("nnssl_ext.networks.architectures", "nnssl_ext.networks")
    return next(path for folder in folders if pydoc.locate(path := f"{folder}.{name}") is not None)


def _plans(chosen: dict, batch: int) -> dict:
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    channels, spacing = chosen.get("channels", 1), chosen.get("spacing", [1.0, 1.0, 1.0])
    configuration = {
        "data_identifier": DATA,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": chosen["patch"],
        "median_image_size_in_voxels": [float(3 * n // 2) for n in chosen["patch"]],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
        **{f"resampling_fn_{what}_kwargs": resampling for what in ("data", "seg", "probabilities")},
        "architecture": _architecture(chosen),
        "batch_dice": False,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": configuration["median_image_size_in_voxels"],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(channels)},
    }
