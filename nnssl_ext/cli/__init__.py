"""The ``nnssl_ext`` command: one module per subcommand, found by its name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl_ext import __version__
from nnssl_ext.cli import (
    corpus,
    demo,
    doctor,
    export,
    methods,
    msd,
    phantom,
    plan,
    probe,
    sources,
    study,
    train,
    trainers,
    transfer,
)

COMMANDS = (trainers, plan, corpus, train, transfer, sources, export, study, probe, demo, doctor, msd, phantom, methods)


def command_line() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="nnssl_ext", description="Self-supervised pretraining for stock nnU-Net.")
    parser.add_argument("--version", action="version", version=f"nnssl_ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 on success, 1 for unusable input, 2 for a wrong command line."""
    parsed = command_line().parse_args(arguments)
    return parsed.run(parsed) or 0
