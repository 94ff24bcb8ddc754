"""Run the whole pipeline on a phantom or a Decathlon task.

    nnssl_ext demo [--output nnssl_demo] [--minutes 8] [--msd TaskXX_NAME[.tar]]

Phantom or task -> stock planning and preprocessing -> pretraining -> stock fine-tuning with and without the pretrained
weights -> demo.html. It times a step first and chooses its lengths for --minutes. A second call continues.
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from nnssl_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", default="nnssl_demo", metavar="FOLDER", help="folder for all files (nnssl_demo)")
    add("--minutes", type=float, default=8.0, help="time for everything, from 2 (8)")
    add("--msd", metavar="TASK", help="folder or tar file of a Decathlon task instead of the phantom")
    add("--labeled", "--labelled", type=int, default=6, help="labeled cases for fine-tuning (6)")
    add("-device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    add("--open", action="store_true", help="open the page in a browser, where there is a display")
    add("settings", nargs="*", metavar="SETTING=VALUE", help="laid over the demo's plans, as in nnssl_ext plan")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.environment import check_device, default_device
    from nnssl_ext.study.demo.demo import Demo
    from nnssl_ext.study.demo.page import write_page
    from nnssl_ext.study.demo.phantom import PhantomOptions
    from nnssl_ext.study.demo.sources import DecathlonSource, PhantomSource, Source

    source: Source = PhantomSource(PhantomOptions(labeled=arguments.labeled, test=8, field_of_view=36.0))
    if arguments.msd:
        source = DecathlonSource(Path(arguments.msd), arguments.labeled)
    device = arguments.device or default_device()
    check_device(device)
    if not arguments.minutes >= 2:
        raise UserError(f"--minutes: expected at least 2, got {arguments.minutes:g}.")
    folder = Path(arguments.output).resolve()
    demo = Demo(folder, source, arguments.minutes, device, arguments.settings)
    demo.run()
    page = write_page(demo)
    print(f"The result page: {page}")
    if arguments.open and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(page.as_uri())
