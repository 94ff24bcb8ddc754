"""Fuzz the readers of outside files, guided by coverage. It needs atheris and a checkout.

    python -m benchmarks fuzz_atheris [--seconds 60] [--readers checkpoint weights ...]

Each reader gets a process of its own and starts from a valid file. Anything but an answer or a one-line UserError ends
it, with the input in a file crash-*; exit status 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one reader in this process, which atheris ends.

    Args:
        name: In ``READERS``.
        seconds: For so long.
        folder: An empty one.
    """
    import atheris

    with atheris.instrument_imports(include=["nnssl_ext"]):
        from nnssl_ext.errors import UserError
        from tests.test_fuzz import READERS

    file, write, read = READERS[name]
    valid = write(folder / file).read_bytes()
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(valid)
    warnings.simplefilter("ignore")

    def one(content: bytes) -> None:
        (folder / file).write_bytes(content)
        try:
            read(folder / file)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"{name}: {error!s} has several lines") from error

    limits = [f"-max_total_time={seconds}", f"-max_len={2 * len(valid)}", "-timeout=30"]
    atheris.Setup(["fuzz", str(corpus), *limits, f"-artifact_prefix={Path.cwd()}/"], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--readers", nargs="+", help="of those in tests/test_fuzz.py (all)")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        fuzz(arguments.readers[0], arguments.seconds, arguments.folder)
    from tests.test_fuzz import READERS

    status = 0
    for name in arguments.readers or READERS:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            words = ["-m", "benchmarks.fuzz_atheris", "--in", folder, "--seconds", str(arguments.seconds)]
            ended = subprocess.run([sys.executable, *words, "--readers", name], capture_output=True, text=True)
        done = [line for line in ended.stderr.splitlines() if line.startswith("Done")]
        print(f"{name}: {' '.join(done) if ended.returncode == 0 else 'FAILED'}", flush=True)
        if ended.returncode:
            print(ended.stderr[-3000:], file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
