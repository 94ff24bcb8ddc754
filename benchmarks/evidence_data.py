"""Make the data sets and plans of the evidence of version 0.2 from public ones.

    python -m benchmarks evidence_data ACDC EMIDEC [--patch 5 64 64]

ACDC and EMIDEC are folders of raw nnU-Net data sets of labeled short-axis hearts. In nnUNet_raw this writes data sets
813 (EMIDEC) and 814 (ACDC), both cut to 112 x 112 voxels around the labels, so absolute Dice is optimistic. It
preprocesses them and derives plans ``nnUNetPlans_roi`` of a U-Net of 8 to 64 features. Fold 0 of ACDC holds out the
last fifth of the patients. Data set 816 is the corpus of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import SimpleITK
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from benchmarks.hand_over import run
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.protocol import grouped

EDGE = 112
PATIENT = r"patient\d+"
PLANS = "nnUNetPlans_roi"
#: Its settings beside the patch: five stages of 8 to 64 features, never strided along z.
NETWORK = [
    "configuration.batch_size=2",
    "architecture.features_base=8",
    "architecture.features_max=64",
    f"architecture.arch_kwargs.strides={[[1, 1, 1]] + [[1, 2, 2]] * 4}",
]


def cut(source: Path, target: Path) -> None:
    """Copy a raw data set, each case cut to ``EDGE`` x ``EDGE`` voxels (x, y) around its labels."""
    listed = get_filenames_of_train_images_and_targets(str(source), read_json(source / "dataset.json", dict))
    if target.exists():
        raise UserError(f"{target} exists already. Remove it to make it again")
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for case in listed.values():
        labels = SimpleITK.ReadImage(case["label"])
        *plane, depth = labels.GetSize()
        voxels = np.argwhere((SimpleITK.GetArrayFromImage(labels) > 0).any(0))[:, ::-1]  # x, y
        middle = np.rint((voxels.min(0) + voxels.max(0)) / 2).astype(int)
        start = np.clip(middle - EDGE // 2, 0, np.subtract(plane, EDGE)).tolist()
        for file in (case["label"], *case["images"]):
            box = SimpleITK.RegionOfInterest(SimpleITK.ReadImage(file), [EDGE, EDGE, depth], [*start, 0])
            SimpleITK.WriteImage(box, target / Path(file).relative_to(source))
    shutil.copy(source / "dataset.json", target)


def hold_out_patients(folder: Path) -> None:
    """Write ACDC's split: the last fifth of the patients is held out, both volumes of each."""
    data = str(folder / "nnUNetPlans_3d_fullres")
    patients = list(grouped(infer_dataset_class(data).get_identifiers(data), PATIENT).values())
    kept = len(patients) * 4 // 5
    parts = {"train": patients[:kept], "val": patients[kept:]}
    split = {part: [case for members in groups for case in members] for part, groups in parts.items()}
    write_json([split], folder / "splits_final.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("acdc", type=Path)
    parser.add_argument("emidec", type=Path)
    parser.add_argument("--patch", type=int, nargs=3, default=(5, 64, 64), help="voxels (z, y, x)")
    arguments = parser.parse_args()
    raw, preprocessed = (Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    targets = {"Dataset814_ACDC": arguments.acdc, "Dataset813_EMIDEC": arguments.emidec}
    patch = f"configuration.patch_size={list(arguments.patch)}"
    for name, source in targets.items():
        cut(source, raw / name)
        which = ["-d", name[7:10], "-c", "3d_fullres"]
        run("nnUNetv2_plan_and_preprocess", *which)
        run("nnssl_ext", "plan", *which, "-o", PLANS, patch, *NETWORK)
    hold_out_patients(preprocessed / "Dataset814_ACDC")
    run(*f"nnssl_ext corpus -d 816 -n HeartROI --like 814 -p {PLANS}".split(), *(str(raw / name) for name in targets))


if __name__ == "__main__":
    main()
