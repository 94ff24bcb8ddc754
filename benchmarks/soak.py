"""Kill trainings at random moments and compare their results with uninterrupted ones.

    python -m benchmarks soak [--kills 20] [--minutes 60] [--jobs 2] [--methods dino finetune ...] [--json FILE]

For each method and the fine-tuner, the stock command trains twice: once without interruption and once killed at random
moments. Kills are SIGKILL, one in four of them while a checkpoint is being written, and SIGTERM every fourth time. The
run continues with --c and another number of workers. Weights, method state, optimizer and objective values must be
equal bit for bit. Memory and open files of the uninterrupted process must be flat.

A method that ends before it was killed often enough runs again with another seed. With --minutes all methods do, until
the time is over. It needs a checkout, since tests/ makes the data. Exit status 1: a run differs or is not flat.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.soak_runs import FINETUNE, Result, Soak
from nnssl_ext.environment import cores
from nnssl_ext.methods import METHODS
from nnssl_ext.provenance import hardware, revision, versions

#: More than this from the third quarter of a run to the last is a leak.
MOST_GROWTH, MOST_FILES = 0.03, 2
HEAD = (
    "| method | runs | SIGKILL | amid a checkpoint | SIGTERM | result | MiB third quarter, last | open files | hours |"
)


def growth(samples: list[float]) -> tuple[float, float]:
    """Return the minimum of a run's third and fourth quarter. A short peak for a picture is no leak."""
    quarter = max(1, len(samples) // 4)
    return min(samples[len(samples) // 2 :][:quarter]), min(samples[-quarter:])


def flat(result: Result) -> bool | None:
    """Return whether memory and open files stayed flat; None if the run was too short."""
    if len(result.memory_mib) < 20:
        return None
    (memory, memory_end), (files, files_end) = growth(result.memory_mib), growth(list(map(float, result.open_files)))
    return memory_end <= memory * (1 + MOST_GROWTH) and files_end <= files + MOST_FILES


def told(result: Result) -> str:
    """Describe a run in one line."""
    words = {True: "flat", False: "NOT FLAT", None: "too short to say whether flat"}[flat(result)]
    return (
        f"{result.method}, seed {result.seed}: {result.kills} times killed ({result.amid_checkpoint} amid a "
        f"checkpoint), {result.terminated} times asked to end; {'EQUAL' if result.equal else 'DIFFERENT'}; memory and "
        f"open files {words}; {result.seconds:.0f} s"
    )


def table(results: list[Result]) -> str:
    """Return a Markdown table with one row a method."""
    rows = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        kills, amid, terminated = (sum(getattr(r, n) for r in own) for n in ("kills", "amid_checkpoint", "terminated"))
        verdicts = [flat(result) for result in own]
        words = "equal" if all(result.equal for result in own) else "DIFFERENT"
        words += ", flat" if all(verdicts) else ", NOT FLAT" if False in verdicts else ", too short for flat"
        longest = max(own, key=lambda result: len(result.memory_mib))
        memory, files = growth(longest.memory_mib or [0]), growth([float(n) for n in longest.open_files] or [0])
        rows.append(
            f"| {method} | {len(own)} | {kills} | {amid} | {terminated} | {words} | {memory[0]:,.0f}, {memory[1]:,.0f} "
            f"| {files[0]:.0f}, {files[1]:.0f} | {sum(result.seconds for result in own) / 3600:.2f} |"
        )
    return "\n".join(rows)


def one_method(soak: Soak, method: str, first_seed: int, kills: int) -> list[Result]:
    """Run a method with one seed after the other until it was killed often enough."""
    results: list[Result] = []
    while (left := kills - sum(result.kills for result in results)) > 0:
        results.append(soak.run(method, first_seed + len(results), left))
        print(told(results[-1]), flush=True)
        if not results[-1].kills + results[-1].terminated:
            raise SystemExit(f"{method} ended before it could be killed; give it more --epochs")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*METHODS, FINETUNE]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each method, at least")
    parser.add_argument("--minutes", type=float, default=0, help="go on until this time is over")
    parser.add_argument("--epochs", type=int, default=0, help="of each run, seven steps each (four for each kill)")
    parser.add_argument("--jobs", type=int, default=1, help="methods at the same time")
    parser.add_argument("--output", type=Path, help="an empty folder (a temporary one)")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured (soak.json there)")
    arguments = parser.parse_args()
    root = arguments.output or Path(tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(root, arguments.epochs or max(12, 4 * arguments.kills))
    command = f"python -m benchmarks soak {shlex.join(sys.argv[1:])}"
    print(f"{command}\nin {root}", flush=True)
    begin, lock, seed, results = time.monotonic(), threading.Lock(), 0, list[Result]()

    def work(method: str) -> None:
        found = one_method(soak, method, seed, arguments.kills)
        with lock:
            results.extend(found)
            content = {
                "command": command,
                "seconds": time.monotonic() - begin,
                "hardware": hardware(),
                "system": platform.platform(),
                "cores": cores(),
                "versions": versions(),
                "revision": revision(),
                "flat": [flat(result) for result in results],
                "results": [asdict(result) for result in results],
            }
            (arguments.json or root / "soak.json").write_text(json.dumps(content, indent=1))

    while seed == 0 or time.monotonic() - begin < arguments.minutes * 60:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            # the order of the first round is the same in every run; nothing else depends on it
            list(pool.map(work, random.Random(seed).sample(arguments.methods, len(arguments.methods))))
        seed += 100
    print(f"\n{table(sorted(results, key=lambda r: names.index(r.method)))}")
    print(f"\n{(time.monotonic() - begin) / 60:.0f} minutes, {sum(result.kills for result in results)} SIGKILLs")
    return int(not all(result.equal and flat(result) is not False for result in results))


if __name__ == "__main__":
    sys.exit(main())
