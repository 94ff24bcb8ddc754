"""Networks of plans, and the transfer command."""

import os
from pathlib import Path

from torch import nn

from nnssl_ext.cli import main
from nnssl_ext.environment import dataset_folder
from nnssl_ext.transfer.target import build_target, target_plans
from tests.datasets import _NUMBERS


def stock_network(kind: str, plans: str = "nnUNetPlans", trainer: str = "nnUNetTrainer", seed: int = 99) -> nn.Module:
    folder = dataset_folder(str(_NUMBERS[kind]))
    return build_target(target_plans(folder, plans, "3d_fullres", trainer), seed).network


def transferred(source: Path | str, kind: str, *options: str) -> Path:
    file = Path(os.environ["nnUNet_results"]) / f"{Path(source).stem}_{kind}_{len(options)}.pth"
    command = ["transfer", str(source), "-d", str(_NUMBERS[kind]), "-c", "3d_fullres", "-o", str(file), *options]
    assert main(command) == 0
    return file
