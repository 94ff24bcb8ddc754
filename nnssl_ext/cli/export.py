"""Export a finished pretraining.

    nnssl_ext export RUN -o FOLDER          a folder for Hugging Face, with a model card filled from the run
    nnssl_ext export RUN --zip              what nnUNetv2_export_model_to_zip needs, and its command

RUN is a fold folder in nnUNet_results, or its checkpoint_final.pth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="fold folder of a pretraining, or its checkpoint")
    parser.add_argument("-o", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--name", default="", help="the model's name on its card; default: the folder's")
    parser.add_argument(
        "--license", "--licence", default="", help="such as cc-by-4.0; without it the card has a line to fill in"
    )
    parser.add_argument("--safetensors", action="store_true", help="write model.safetensors too")
    parser.add_argument("--zip", action="store_true", help="prepare RUN for nnUNetv2_export_model_to_zip")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.transfer.export import export_folder, finished_run, prepare_zip

    if not arguments.o and not arguments.zip:
        raise UserError("nothing to do. Give -o FOLDER, --zip or both")
    if not arguments.o and (arguments.name or arguments.license or arguments.safetensors):
        raise UserError("--name, --license and --safetensors belong to a folder. Give -o FOLDER, or leave them out")
    file, content = finished_run(Path(arguments.run_folder).expanduser())
    if arguments.o:
        folder = Path(arguments.o).expanduser().resolve()
        export_folder(content, folder, arguments.name or folder.name, arguments.license, arguments.safetensors)
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"wrote {folder}: {written}")
        if not arguments.license:
            print(f"fill in the license in {folder / 'README.md'} before you publish it")
    if arguments.zip:
        print(f"now run, from where the zip is to be:\n  {prepare_zip(file, content)}")
