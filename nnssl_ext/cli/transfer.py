"""Fit pretrained weights to a data set's network.

    nnssl_ext transfer SOURCE -d 9 -c 3d_fullres -o init.pth
    nnUNetv2_train 9 3d_fullres 0 -pretrained_weights init.pth

SOURCE is a checkpoint of nnssl_ext, nnU-Net or nnssl, a state dict, a folder that holds one, a Hugging Face repository
(owner/name) or a name that nnssl_ext sources lists. The table shows what became of every tensor. The rules
stand in docs/how-to/transfer.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.commands import OCCASIONS, RunName, recipe_commands
from nnssl_ext.environment import dataset_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="file, folder, Hugging Face repository or known source")
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID to be trained on")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="its configuration, such as 3d_fullres")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="its plans (nnUNetPlans)")
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="its trainer (nnUNetTrainer)")
    parser.add_argument("-o", required=True, metavar="FILE", help="file to write, such as init.pth")
    parser.add_argument(
        "--align",
        choices=("auto", "index", "resolution"),
        default="auto",
        help="match stages by number (index), by resolution in millimeters, or by number where both encoders are of "
        "one family and by resolution elsewhere (auto, default)",
    )
    parser.add_argument(
        "--overlap", action="store_true", help="where widths differ, copy the channels that both sides have"
    )
    parser.add_argument(
        "--lengths",
        choices=("keep", "initial"),
        default="keep",
        help="initial: scale convolutions that a norm follows to the length of fresh ones; the function stays the same",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="accept that less than a tenth of the encoder is filled"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial values of what is not filled (0)")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.networks.backbone import backbone_of
    from nnssl_ext.transfer import target as write
    from nnssl_ext.transfer.read import read_source
    from nnssl_ext.transfer.transfer import transfer

    folder = dataset_folder(arguments.d)
    to = write.target_plans(folder, arguments.p, arguments.c, arguments.tr)
    path = Path(arguments.o).expanduser()
    write.check_free(path)
    source = read_source(arguments.source)
    target = write.build_target(to, arguments.seed)
    report = transfer(
        source,
        target,
        overlap=arguments.overlap,
        alignment=arguments.align,
        initial_lengths=arguments.lengths == "initial",
        allow_partial=arguments.allow_partial,
    )
    write.write(path, target, to, source, report, arguments.seed)
    run = RunName(folder.name, arguments.c, "FOLD", arguments.p, arguments.tr)
    print(f"{source.path} ({source.kind})\n{report}\nwrote {path}; use it with\n  {run.command(arguments.o)}")
    if note := run.replaces():
        print(note)
    if arguments.tr == "nnUNetTrainer":
        is_transformer = backbone_of(target.network).is_transformer
        recipe, occasion = OCCASIONS[is_transformer]
        print(f"or, {occasion}:")
        for command in recipe_commands(run, recipe, path, longer=arguments.lengths == "keep"):
            print(f"  {command}")
