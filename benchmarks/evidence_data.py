"""Make the data sets and plans of the evidence of version 0.2 from public ones.

    python -m benchmarks evidence_data ACDC EMIDEC [--patch 5 64 64]

ACDC and EMIDEC are raw nnU-Net data sets of labeled short-axis hearts. In nnUNet_raw this writes data sets 813 (EMIDEC)
and 814 (ACDC), both cut to 112 x 112 voxels around the labels, so absolute Dice is optimistic. It preprocesses them and
writes plans ``nnUNetPlans_roi`` of a U-Net of 8 to 64 features. Fold 0 of ACDC holds out the last fifth of the
patients. Data set 816 is the corpus of both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.protocol import grouped

EDGE = 112
PATIENT = r"patient\d+"


def cut(source: Path, target: Path) -> None:
    """Copy a raw data set, each case cut to ``EDGE`` x ``EDGE`` voxels (x, y) around its labels."""
    ending = read_json(source / "dataset.json", dict)["file_ending"]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for file in sorted((source / "labelsTr").glob(f"*{ending}")):
        labels = SimpleITK.ReadImage(file)
        size = labels.GetSize()
        start = []
        for axis in (0, 1):  # of SimpleITK, so x and y
            others = tuple(a for a in range(3) if a != 2 - axis)
            found = np.flatnonzero((SimpleITK.GetArrayFromImage(labels) > 0).any(others))
            start.append(int(np.clip(round((found[0] + found[-1]) / 2) - EDGE // 2, 0, size[axis] - EDGE)))
        box = ([EDGE, EDGE, size[2]], [*start, 0])
        name = f"{file.name.removesuffix(ending)}_0000{ending}"
        SimpleITK.WriteImage(SimpleITK.RegionOfInterest(labels, *box), target / "labelsTr" / file.name)
        image = SimpleITK.ReadImage(source / "imagesTr" / name)
        SimpleITK.WriteImage(SimpleITK.RegionOfInterest(image, *box), target / "imagesTr" / name)
    shutil.copy(source / "dataset.json", target)


def small_plans(folder: Path, patch: Sequence[int]) -> None:
    """Write ``nnUNetPlans_roi`` beside a data set's plans: five stages, never strided along z."""
    plans = read_json(folder / "nnUNetPlans.json", dict) | {"plans_name": "nnUNetPlans_roi"}
    configuration = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {"3d_fullres": configuration | {"batch_size": 2, "patch_size": list(patch)}}
    configuration["architecture"]["arch_kwargs"] |= {
        "features_per_stage": [8, 16, 32, 64, 64],
        "strides": [[1, 1, 1]] + [[1, 2, 2]] * 4,
    }
    write_json(plans, folder / "nnUNetPlans_roi.json")


def hold_out_patients(folder: Path) -> None:
    """Write ACDC's split: the last fifth of the patients is held out, both volumes of each."""
    cases = sorted(file.name.removesuffix(".b2nd") for file in folder.glob("nnUNetPlans_3d_fullres/*[0-9].b2nd"))
    patients = list(grouped(cases, PATIENT).values())
    parts = patients[: len(patients) * 4 // 5], patients[len(patients) * 4 // 5 :]
    train, held_out = ([case for patient in part for case in patient] for part in parts)
    (folder / "splits_final.json").write_text(json.dumps([{"train": train, "val": held_out}]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("acdc", type=Path)
    parser.add_argument("emidec", type=Path)
    parser.add_argument("--patch", type=int, nargs=3, default=(5, 64, 64), help="voxels (z, y, x)")
    arguments = parser.parse_args()
    raw, preprocessed = (Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    targets = {"Dataset814_ACDC": arguments.acdc, "Dataset813_EMIDEC": arguments.emidec}
    for name, source in targets.items():
        cut(source, raw / name)
        words = ["nnUNetv2_plan_and_preprocess", "-d", name[7:10], "-c", "3d_fullres"]
        subprocess.run(words, check=True)
        small_plans(preprocessed / name, arguments.patch)
    hold_out_patients(preprocessed / "Dataset814_ACDC")
    words = ["nnssl_ext", "corpus", "-d", "816", "-n", "HeartROI", "--like", "814", "-p", "nnUNetPlans_roi"]
    subprocess.run([*words, *(str(raw / name) for name in targets)], check=True)


if __name__ == "__main__":
    main()
