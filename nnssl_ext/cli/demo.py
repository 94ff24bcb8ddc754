"""Show the whole line on a phantom or a Decathlon task, and write a result page.

    nnssl_ext demo [--output nnssl_demo] [--msd TaskXX_NAME[.tar]]

Phantom or task -> stock planning and preprocessing -> pretraining -> stock fine-tuning with and without the pretrained
weights -> demo.html. About ten minutes on two CPU cores. Called again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="nnssl_demo", metavar="FOLDER", help="all files go there (nnssl_demo)")
    parser.add_argument("--msd", metavar="TASK", help="a Decathlon task's folder or tar file instead of the phantom")
    parser.add_argument("--labelled", type=int, default=6, help="labelled cases for fine-tuning (6)")
    parser.add_argument("-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--open", action="store_true", help="open the page in a browser, where there is a display")
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING=VALUE", help="laid over the demonstration's plans, as in nnssl_ext plan"
    )


def run(arguments: argparse.Namespace) -> None:
    import torch

    from nnssl_ext.study.demo.demo import Demo
    from nnssl_ext.study.demo.page import write_page
    from nnssl_ext.study.demo.phantom import PhantomOptions
    from nnssl_ext.study.demo.sources import DecathlonSource, PhantomSource, Source

    source: Source = PhantomSource(PhantomOptions(labelled=arguments.labelled, test=8, field_of_view=36.0))
    if arguments.msd:
        source = DecathlonSource(Path(arguments.msd), arguments.labelled)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    demo = Demo(Path(arguments.output).resolve(), source, device, settings=arguments.settings)
    demo.run()
    page = write_page(demo)
    print(f"the result page: {page}")
    if arguments.open and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(page.as_uri())
