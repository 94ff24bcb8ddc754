"""Data sets and plans that benchmarks run on: large volumes as nnU-Net stores them, the plans that nnU-Net makes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from scipy.ndimage import gaussian_filter

DATASET = "Dataset899_Benchmark"
DATA = "nnUNetPlans_3d_fullres"

#: Patch, batch, channels of the stages, strides; and blocks of a residual encoder. "hippocampus" is what nnU-Net plans
#: for Task04, "residual" its ResEnc-L for large isotropic volumes.
PLANS: dict[str, dict] = {
    "hippocampus": {
        "patch": [40, 56, 40],
        "batch": 9,
        "features": [32, 64, 128, 256],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
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
    """A body with texture, in whole numbers of a scanner's scale, normalised: as compressible as images are."""
    smooth = gaussian_filter(generator.standard_normal([max(2, n // 4) for n in shape]), 2)
    repeated = smooth
    for axis, length in enumerate(shape):
        repeated = repeated.take(np.arange(length) * smooth.shape[axis] // length, axis)
    image = np.rint(400 * repeated / repeated.std() + 25 * generator.standard_normal(shape, dtype=np.float32))
    return ((image - image.mean()) / image.std()).astype(np.float32)


def write_cases(folder: Path, shape: tuple[int, ...], cases: int, patch: list[int]) -> None:
    """Preprocessed cases with the chunks and blocks that nnU-Net chooses for the patch."""
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


def write_dataset(
    root: Path, plan: str, settings: dict, *, cases: int = 4, batch: int | None = None, shape: tuple[int, ...] = ()
) -> Path:
    """An nnU-Net environment in ``root`` with one preprocessed data set; nnU-Net's variables are set to it.

    Args:
        root: An empty folder.
        plan: A name of ``PLANS``.
        settings: The section ``nnssl_ext`` of the plans.
        cases: How many cases.
        batch: Batch size; None for the plan's.
        shape: Of a case; empty for a half more than the patch.
    """
    variables = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    for name, part in variables.items():
        (root / part).mkdir()
        os.environ[name] = str(root / part)
    chosen = PLANS[plan]
    folder = root / "preprocessed" / DATASET
    write_cases(folder / DATA, shape or tuple(3 * n // 2 for n in chosen["patch"]), cases, chosen["patch"])
    plans = {**_plans(chosen, batch or chosen["batch"]), "nnssl_ext": settings}
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": cases}
    for name, value in (("nnUNetPlans", plans), ("dataset", {**content, "file_ending": ".nii.gz"})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


def _plans(chosen: dict, batch: int) -> dict:
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
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": DATA,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": chosen["patch"],
        "median_image_size_in_voxels": [float(3 * n // 2) for n in chosen["patch"]],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
        **{f"resampling_fn_{what}_kwargs": resampling for what in ("data", "seg", "probabilities")},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
        },
        "batch_dice": False,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": configuration["median_image_size_in_voxels"],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }
