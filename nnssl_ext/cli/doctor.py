"""Check the installation and a data set, with advice.

    nnssl_ext doctor [-d DATASET] [--report FILE]

The report is for questions and bug reports. It holds no paths and no names of data sets or cases.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", metavar="DATASET", help="also check this data set (name or ID)")
    parser.add_argument("--report", metavar="FILE", help="also write the findings to a file, without paths and names")


def run(arguments: argparse.Namespace) -> int:
    import contextlib
    import io

    from nnssl_ext.doctor import examine, write_report

    findings = []
    checks = examine(arguments.d)
    while True:
        with contextlib.redirect_stdout(io.StringIO()):  # what other modules print while they are imported
            finding = next(checks, None)
        if finding is None:
            break
        print(finding, flush=True)
        findings.append(finding)
    troubles = sum(bool(finding.trouble) for finding in findings)
    print(f"{troubles} problem{'s' * (troubles != 1)} found" if troubles else "all is well")
    if arguments.report:
        write_report(findings, arguments.report)
        print(f"wrote {arguments.report}")
    return 1 if troubles else 0
