"""Small preprocessed data sets, written with nnU-Net's own writer: one per kind of plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

KINDS = ("plain", "residual", "anisotropic", "two_channel")
#: Data sets whose plans name a network of ours.
OWN_NETWORKS = ("vit", "pct_net")

#: The smallest settings that are still a training.
QUICK: dict[str, Any] = {
    "epochs": 2,
    "iterations_per_epoch": 3,
    "validation_iterations": 2,
    "save_every": 1,
    "pretext_picture_every": 0,
    "dino": {"local_crops": 2, "hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 128, "teacher_momentum": 0.5},
}

_NUMBERS = {
    "plain": 811,
    "residual": 812,
    "anisotropic": 813,
    "two_channel": 814,
    "regions": 815,
    "lowres": 816,
    "labelled": 817,
    "vit": 818,
    "pct_net": 819,
}


def dataset_name(kind: str) -> str:
    return f"Dataset{_NUMBERS[kind]}_{kind.replace('_', '').title()}"


#: The smallest of our networks.
_OWN: dict[str, tuple[str, dict]] = {
    "vit": (
        "nnssl_ext.networks.architectures.vit.ViTUNETR",
        {
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "position_grid": [3, 3, 3],
            "decoder_features": 4,
        },
    ),
    "pct_net": (
        "nnssl_ext.networks.architectures.pct_net.PCTNet",
        {
            "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
            "features_per_stage": [4, 4, 8, 8, 16],
            "heads": [2, 2, 4],
            "window": 2,
        },
    ),
}


def architecture(kind: str) -> dict:
    if kind in _OWN:
        name, kwargs = _OWN[kind]
        return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}
    anisotropic = kind == "anisotropic"
    residual = kind == "residual"
    blocks = {"n_blocks_per_stage": [1, 2, 2]} if residual else {"n_conv_per_stage": [1, 1, 1]}
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet."
        + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 12],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3] if anisotropic else [3, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [1, 2, 2] if anisotropic else [2, 2, 2], [2, 2, 2]],
            **blocks,
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(kind: str) -> dict:
    patch = {"anisotropic": [8, 24, 24], "pct_net": [8, 32, 32]}.get(kind, [16, 16, 16])
    spacing = [5.0, 1.0, 1.0] if kind in ("anisotropic", "pct_net") else [1.0, 1.0, 1.0]
    channels = 2 if kind == "two_channel" else 1
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [22.0, 26.0, 24.0],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {
            "is_seg": False,
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        },
        "architecture": architecture(kind),
        "batch_dice": False,
    }
    flat = {**configuration, "patch_size": patch[1:], "data_identifier": "nnUNetPlans_2d"}
    lowres = {**configuration, "data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"}
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {
        "dataset_name": dataset_name(kind),
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [22, 26, 24],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": flat,
            "3d_fullres": configuration,
            "3d_lowres": lowres,
            "3d_cascade_fullres": cascade,
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(c): {
                "max": 1.0,
                "mean": 0.0,
                "median": 0.0,
                "min": 0.0,
                "percentile_00_5": 0.0,
                "percentile_99_5": 1.0,
                "std": 1.0,
            }
            for c in range(channels)
        },
    }


def make_labels(kind: str) -> dict:
    if kind == "regions":
        return {
            "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
            "regions_class_order": [1, 2],
        }
    return {"labels": {"background": 0, "organ": 1, "tumour": 2}}


def blob(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An ellipsoid 'body' with organs and noise: float32, about zero mean and unit deviation."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    image = 0.05 * generator.standard_normal(shape)
    for intensity, radius in ((1.0, 0.95), (0.6, 0.5), (-0.5, 0.35)):
        centre = generator.uniform(-0.3, 0.3, 3) * (radius < 0.9)
        image += intensity * (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2)
    return ((image - image.mean()) / image.std()).astype(np.float32)


def make_dataset(preprocessed: Path, kind: str, cases: int = 6, seed: int = 0) -> Path:
    """Write data set ``kind`` into an nnUNet_preprocessed root; returns its folder."""
    folder = preprocessed / dataset_name(kind)
    plans = make_plans(kind)
    generator = np.random.default_rng(seed)
    shape = {"anisotropic": (9, 30, 28), "pct_net": (9, 34, 32)}.get(kind, (20, 24, 22))
    channels = len(plans["configurations"]["3d_fullres"]["normalization_schemes"])
    for configuration in ("nnUNetPlans_3d_fullres", "nnUNetPlans_3d_lowres"):
        (folder / configuration).mkdir(parents=True)
        for case in range(cases):
            # one case is smaller than the patch along an axis
            edges = shape if case else (shape[0], shape[1], 14)
            image = np.stack([blob(generator, edges) for _ in range(channels)])
            nnUNetDatasetBlosc2.save_case(
                image,
                np.zeros((1, *edges), np.int8),
                {"class_locations": {}},
                str(folder / configuration / f"case_{case:02d}"),
                (1, *edges),
                (1, *edges),
            )
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    names = {str(c): f"MR{c}" for c in range(channels)}
    content = {"channel_names": names, "numTraining": cases, "file_ending": ".nii.gz", **make_labels(kind)}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def make_labelled(preprocessed: Path, cases: int = 10) -> Path:
    """Write data set ``labelled``, an organ with a tumour in it in each case, by nnU-Net's own preprocessing.

    The images lie in ``imagesTr`` beside the labels in ``gt_segmentations``.
    """
    folder = preprocessed / dataset_name("labelled")
    plans = make_plans("labelled")
    content = {"channel_names": {"0": "MR"}, "numTraining": cases, "file_ending": ".nii.gz", **make_labels("labelled")}
    for part in ("nnUNetPlans_3d_fullres", "gt_segmentations", "imagesTr"):
        (folder / part).mkdir(parents=True)
    preprocessor, manager = DefaultPreprocessor(verbose=False), PlansManager(plans)
    for case in range(cases):
        name = f"case_{case:02d}"
        image, truth = labelled_blob(np.random.default_rng(case), (20, 24, 22))
        files = [str(folder / "imagesTr" / f"{name}_0000.nii.gz"), str(folder / "gt_segmentations" / f"{name}.nii.gz")]
        for array, file in zip((image, truth), files, strict=True):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), file)
        target = str(folder / "nnUNetPlans_3d_fullres" / name)
        configuration = manager.get_configuration("3d_fullres")
        preprocessor.run_case_save(target, files[:1], files[1], manager, configuration, content)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def labelled_blob(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A body with an organ (1) and a tumour in it (2): image float32, labels uint8."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centre = generator.uniform(-0.25, 0.25, 3)
    distance = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
    truth = (distance < 0.55**2).astype(np.uint8) + (distance < 0.3**2)
    body = sum(a**2 for a in axes) < 0.9
    image = 0.3 * generator.standard_normal(shape) + body + 0.8 * (truth == 1) - 0.8 * (truth == 2)
    return image.astype(np.float32), truth
