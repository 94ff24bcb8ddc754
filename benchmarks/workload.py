"""Write the data sets and plans that benchmarks run on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from scipy.ndimage import gaussian_filter

from nnssl_ext.methods import TRAINERS

DATASET = "Dataset899_Benchmark"
#: What ``write_tiny`` writes.
TINY_NUMBER, TINY_DATASET = 891, "Dataset891_Plain"
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
    # our own networks at the sizes of their recipes, and small
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
            "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
            "mlp_ratio": 4.0,
            "layer_scale": 1e-5,
            "drop_path": 0.3,
            "embed_dim": 1024,
            "depth": 24,
            "num_heads": 16,
            "position_grid": [7, 7, 7],
            "checkpointing": True,
        },
    },
    "tiny_vit": {
        "patch": [16, 16, 16],
        "batch": 2,
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
    "tiny_pct_net": {
        "patch": [8, 32, 32],
        "batch": 2,
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


def write_tiny(root: Path) -> Path:
    """Write a tiny data set with two labels, preprocessed by nnU-Net's own code.

    Args:
        root: An nnU-Net environment with the folders raw, preprocessed and results.
    """
    folder = root / "preprocessed" / TINY_DATASET
    plans = {**_plans(PLANS["tiny"], 2), "dataset_name": TINY_DATASET}
    content = {
        "channel_names": {"0": "MR0"},
        "labels": {"background": 0, "organ": 1, "tumor": 2},
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    for part in (DATA, "gt_segmentations", "imagesTr"):
        (folder / part).mkdir(parents=True)
    preprocessor, manager = DefaultPreprocessor(verbose=False), PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    for number in range(8):
        case, arrays = f"case_{number:02d}", labeled_body(np.random.default_rng(number))
        image = str(folder / "imagesTr" / f"{case}_0000.nii.gz")
        label = str(folder / "gt_segmentations" / f"{case}.nii.gz")
        for array, file in zip(arrays, (image, label), strict=True):
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), file)  # x, y, z
        preprocessor.run_case_save(str(folder / DATA / case), [image], label, manager, configuration, content)
    for name, value in (("nnUNetPlans", plans), ("dataset", content), ("dataset_fingerprint", {})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def labeled_body(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of a body with an organ (1) and a tumor (2), and the labels."""
    shape = (20, 24, 22)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    center = generator.uniform(-0.25, 0.25, 3)
    distance = sum((a - c) ** 2 for a, c in zip(axes, center, strict=True))
    truth = (distance < 0.55**2).astype(np.uint8) + (distance < 0.3**2)
    body = sum(a**2 for a in axes) < 0.9
    clean = body + 0.8 * (truth == 1) - 0.8 * (truth == 2)
    return (clean + 0.3 * generator.standard_normal(shape)).astype(np.float32), truth


def write_images(folder: Path) -> None:
    """Write a labeled set of 2-D images: two classes of stripes, four images each."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("flat", "striped")):
        (folder / name).mkdir(parents=True)
        for image in range(4):
            pixels = 128 + 20 * generator.standard_normal((48, 48)) + 60 * number * np.sin(np.arange(48))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{image}.png")


def write_dataset(
    root: Path, plan: str, settings: dict, *, batch: int | None = None, written: Path | None = None
) -> Path:
    """Write an nnU-Net environment with one preprocessed data set, and set nnU-Net's variables to it.

    Args:
        root: A folder for it.
        plan: A name of ``PLANS``.
        settings: The section ``nnssl_ext`` of the plans, beside one long epoch and a folder of 2-D images.
        batch: Batch size; None for the plan's.
        written: A data set of the same plan whose cases are taken.
    """
    for part in ("raw", "preprocessed", "results"):
        (root / part).mkdir(parents=True)
        os.environ[f"nnUNet_{part}"] = str(root / part)
    write_images(root / "images")
    chosen, cases = PLANS[plan], 4
    folder = root / "preprocessed" / DATASET
    if written is None:
        write_cases(folder / DATA, tuple(3 * n // 2 for n in chosen["patch"]), cases, chosen["patch"])
    else:
        shutil.copytree(written / DATA, folder / DATA, copy_function=os.link)
    settings = {"iterations_per_epoch": 100_000, "epochs": 1, "images": str(root / "images"), **settings}
    plans = {**_plans(chosen, batch or chosen["batch"]), "nnssl_ext": settings}
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": cases}
    for name, value in (("nnUNetPlans", plans), ("dataset", {**content, "file_ending": ".nii.gz"})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def _architecture(chosen: dict) -> dict:
    if "network" in chosen:
        return {
            "network_class_name": f"nnssl_ext.networks.architectures.{chosen['network']}",
            "arch_kwargs": chosen["kwargs"],
            "_kw_requires_import": [],
        }
    stages = len(chosen["features"])
    kwargs = {
        "n_stages": stages,
        "features_per_stage": chosen["features"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
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
        kind = recursive_find_trainer_class_by_name(TRAINERS[method])
        trainer = kind({**plans, "continue_training": False}, CONFIGURATION, "all", content, device)
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
    return trainer


def _plans(chosen: dict, batch: int) -> dict:
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    spacing = chosen.get("spacing", [1.0, 1.0, 1.0])
    configuration = {
        "data_identifier": DATA,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": chosen["patch"],
        "median_image_size_in_voxels": [float(3 * n // 2) for n in chosen["patch"]],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
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
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
