"""Print the folder for nnU-Net's variable nnUNet_extTrainer.

    export nnUNet_extTrainer="$(nnssl_ext trainers)"

With --append, folders that the variable names already stay in front.
"""

from __future__ import annotations

import argparse

from nnssl_ext.external_trainers import trainer_folders
from nnssl_ext.resources import resource_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--append", action="store_true", help="keep the folders that nnUNet_extTrainer names now")


def run(arguments: argparse.Namespace) -> None:
    print(trainer_folders() if arguments.append else resource_folder("trainers"))
