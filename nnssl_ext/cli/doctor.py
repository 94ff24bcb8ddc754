"""Look at the installation and at a data set, and say what to do about each problem.

nnssl_ext doctor [-d DATASET]
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", metavar="DATASET", help="also look at this data set (name or ID)")


def run(arguments: argparse.Namespace) -> int:
    import contextlib
    import io

    from nnssl_ext.doctor import Finding, examine_dataset, examine_environment

    findings: list[Finding] = []
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's look-up prints every module it meets
        findings += examine_environment()
        if arguments.d:
            findings += examine_dataset(arguments.d)
    print("\n".join(str(finding) for finding in findings))
    troubles = sum(bool(finding.trouble) for finding in findings)
    print(f"{troubles} trouble{'s' if troubles != 1 else ''}" if troubles else "all is well")
    return 1 if troubles else 0
