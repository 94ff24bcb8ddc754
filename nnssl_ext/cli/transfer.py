"""Fit pretrained weights to the network of a data set's plans.

    nnssl_ext transfer SOURCE -d 9 -c 3d_fullres -o init.pth
    nnUNetv2_train 9 3d_fullres 0 -pretrained_weights init.pth

SOURCE is a checkpoint of nnssl_ext, nnU-Net or nnssl, a ResNet3D-18, a folder that holds one, or a Hugging Face
repository (owner/name). The table says of every tensor what became of it; docs/transfer.md has the rules.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.commands import train_command
from nnssl_ext.environment import dataset_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="file, folder or Hugging Face repository (owner/name)")
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID to be trained on")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="its configuration, such as 3d_fullres")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="its plans (nnUNetPlans)")
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="who will train it (nnUNetTrainer)")
    parser.add_argument("-o", required=True, metavar="FILE", help="file to write, such as init.pth")
    parser.add_argument(
        "--align",
        choices=("resolution", "index"),
        default="resolution",
        help="which stages correspond: those of like resolution in millimetres (default), or of like number",
    )
    parser.add_argument(
        "--overlap", action="store_true", help="where widths differ, copy the channels that both sides have"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial values of what is not filled (0)")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.transfer import target as write
    from nnssl_ext.transfer.read import read_source
    from nnssl_ext.transfer.transfer import transfer

    folder = dataset_folder(arguments.d)
    to = write.destination(folder, arguments.p, arguments.c, arguments.tr)
    path = Path(arguments.o).expanduser()
    write.check_free(path)
    source = read_source(arguments.source)
    target = write.build_target(to, arguments.seed)
    report = transfer(source, target, overlap=arguments.overlap, alignment=arguments.align)
    write.write(path, target, to, source, report, arguments.seed)
    command = train_command(
        folder.name, arguments.c, "FOLD", plans=arguments.p, trainer=arguments.tr, weights=arguments.o
    )
    print(f"{source.path} ({source.kind})\n{report}\nwrote {path}; use it with\n  {command}")
