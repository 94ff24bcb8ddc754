"""Run the ``nnssl_ext`` command, with one module per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from nnssl_ext import __version__
from nnssl_ext.cli import (
    corpus,
    demo,
    doctor,
    export,
    features,
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
from nnssl_ext.environment import check_processes, use_utf8

COMMANDS = (
    trainers,
    plan,
    corpus,
    train,
    transfer,
    sources,
    export,
    features,
    study,
    probe,
    demo,
    doctor,
    msd,
    phantom,
    methods,
)


#: Commands that import no nnU-Net, so that its variables do not matter to them.
LIGHT = ("doctor", "methods", "trainers")
#: A warning of torch about timm, which no user of ours can do anything about.
NOT_OURS = "`torch.jit.interface` is deprecated"


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="nnssl_ext", description="Self-supervised pretraining for stock nnU-Net.")
    parser.add_argument("--version", action="version", version=f"nnssl_ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        text = module.__doc__ or name  # python -OO has no docstrings
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its status.

    0 is success, 1 unusable input, 2 a wrong command line, 130 an interruption.
    """
    if arguments is None:
        use_utf8()
        # for processes that are started, too
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), f"ignore:{NOT_OURS}"]))
    warnings.filterwarnings("ignore", NOT_OURS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"] and words[1:2] not in (["-h"], ["--help"]):  # argparse would take the first option itself
        words.insert(1, "--")
    parsed = command_line().parse_args(words)
    if parsed.command not in LIGHT:
        check_processes()
    try:
        return parsed.run(parsed) or 0
    except KeyboardInterrupt:
        print(f"Stopped. Call nnssl_ext {parsed.command} again to go on.", file=sys.stderr)
        return 130
