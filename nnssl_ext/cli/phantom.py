"""Write a phantom, a raw data set of synthetic cases.

    nnssl_ext phantom -d 900 -o "$nnUNet_raw" --cases 60 --labeled 6 --seed 0

Unlabeled cases carry nnU-Net's ignore label. nnU-Net's planning takes over the splits_final.json that is written too:
fold 0 trains on the labeled cases, fold 1 on all but the test cases (for pretraining), both validate on the test cases.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

from nnssl_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, default=900, metavar="NUMBER", help="number of the data set (900)")
    parser.add_argument("-o", default=os.environ.get("nnUNet_raw"), metavar="FOLDER", help="where to ($nnUNet_raw)")
    parser.add_argument("-n", default="Phantom", metavar="NAME", help="name of the data set (Phantom)")
    parser.add_argument("--cases", type=int, default=60, help="all cases (60)")
    parser.add_argument("--labeled", "--labelled", type=int, default=6, help="labeled training cases (6)")
    parser.add_argument("--test", type=int, default=None, help="labeled test cases (a quarter of the cases)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (0)")
    parser.add_argument("--channels", type=int, default=1, help="channels of a case (1)")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        metavar="MM",
        help="voxel edges, slices first (1 1 1)",
    )


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.study.demo.phantom import PhantomOptions, write_phantom

    folder = _folder(arguments)
    test = arguments.test if arguments.test is not None else max(1, arguments.cases // 4)
    spacing = (arguments.spacing[0], arguments.spacing[1], arguments.spacing[2])
    if not all(map(math.isfinite, spacing)):
        raise UserError(f"--spacing must be three lengths in mm, got {spacing}")
    options = PhantomOptions(arguments.cases, arguments.labeled, test, arguments.seed, arguments.channels, spacing)
    write_phantom(folder, options)
    print(f"wrote {folder}; its folds: 0 trains on the labeled cases, 1 on all but the test cases")


def _folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the data set.

    Raises:
        UserError: If nnU-Net could not find it by this name and number.
    """
    if not arguments.o:
        raise UserError("nnUNet_raw is not set. Export it, or name a folder with -o")
    if not 1 <= arguments.d <= 999:
        raise UserError(f"a data set's number has three digits, got {arguments.d}. Give 1 to 999 with -d")
    if not re.fullmatch(r"[\w.-]+", arguments.n):
        raise UserError(f"a data set's name has letters, digits, '_', '.' and '-', got '{arguments.n}'. Correct -n")
    root, name = Path(arguments.o), f"Dataset{arguments.d:03d}_{arguments.n}"
    others = sorted(path.name for path in root.glob(f"Dataset{arguments.d:03d}*") if path.name != name)
    if others:
        raise UserError(f"{root} has {', '.join(others)}, which nnU-Net also finds as {arguments.d}. Give another -d")
    return root / name
