"""List published pretrained weights that transfer takes.

    nnssl_ext sources                       all of them, one line each
    nnssl_ext sources mis-fm                one of them: data, license, normalization, spacing, networks it fits

The short name is a SOURCE: nnssl_ext transfer openmind-resenc-mae -d 9 -c 3d_fullres -o init.pth
"""

from __future__ import annotations

import argparse

from nnssl_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="short names; default: a list of all")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.transfer.known_sources import KNOWN_SOURCES, described

    unknown = [name for name in arguments.names if name not in KNOWN_SOURCES]
    if unknown:
        raise UserError(f"Expected a known source, got '{unknown[0]}'. nnssl_ext sources lists them")
    if arguments.names:
        print("\n\n".join(map(described, arguments.names)))
        return
    width = max(map(len, KNOWN_SOURCES))
    for name, source in KNOWN_SOURCES.items():
        print(f"{name:<{width}}  {source.what}; {source.modality}; {source.license}")
