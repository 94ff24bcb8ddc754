"""Run nnUNetv2_train, and report errors in one line.

nnssl_ext train 4 3d_fullres 0 -tr nnsslTrainer_VolumeFusion [--max-time HOURS]

After --max-time hours, a pretraining stops with a checkpoint from which --c continues exactly.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as for nnUNetv2_train, and --max-time")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.train import train

    words = arguments.arguments
    train(words[1:] if words[:1] == ["--"] else words)
