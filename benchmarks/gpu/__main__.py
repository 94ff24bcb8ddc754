"""Check and measure everything on a GPU: one command, a few minutes, results as they come.

    python -m benchmarks gpu --minutes 8 --output DIR [--only PART ...] [--device cpu --tiny] [--pay FOLDER]

Parts, in this order: ceilings (copy, matrix product, convolution), correct (values against the CPU, host waits), line
(the stock commands), compile (torch.compile), speed (samples/s, shares, memory), loader (crops/s), ranks (NCCL with one
rank), pay (a study's next runs in the time that is left).

Each part runs in a process of its own with a time limit. DIR/PART.json and DIR/PART.log are written after every row,
DIR/results.json after every part. A row or a part that fails is recorded with its traceback, and the next one runs. A
row in which a part was stopped is listed as unfinished. Exit status 1: something failed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import UNFINISHED, Context, DeviceLostError, NoTimeLeftError, end_group

#: Seconds of each part in a run of eight minutes. Time that a part does not use goes to ``pay``.
LIMITS = {
    "ceilings": 20,
    "correct": 70,
    "line": 110,
    "compile": 80,
    "speed": 110,
    "loader": 15,
    "ranks": 35,
    "memory": 35,
    "pay": 480,
}
#: Status of a process that has lost its device, and the parts that skip their finished rows in the next process.
LOST, SKIPPING = 75, ("correct", "compile", "speed")


def functions() -> dict[str, Callable[[Context], None]]:
    """Import the parts. CUDA must not be initialized before they are forked."""
    from benchmarks.gpu import commands, correct, timing

    return {
        "ceilings": timing.ceilings,
        "correct": correct.correct,
        "line": commands.line,
        "compile": timing.compiling,
        "speed": timing.speed,
        "loader": timing.loader,
        "ranks": commands.ranks,
        "memory": timing.memory,
        "pay": commands.pay,
    }


def run_part(part: str, function: Callable[[Context], None], context: Context) -> None:
    """Run one part in this process, with its output in a log."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the command
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = open(context.output / f"{part}.log", "a", buffering=1)  # noqa: SIM115 (kept open until the process ends)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if context.kind == "cuda" and part != "correct":
        import torch

        torch.backends.cudnn.benchmark = True  # as nnUNetv2_train sets it
    try:
        function(context)
    except NoTimeLeftError as row:
        context.put("ended early", f"no time left for {row}")
    except DeviceLostError:
        os._exit(LOST)  # the end of a spoilt process may hang
    except BaseException:
        context.put("failed", traceback.format_exc())
        raise


def supervise(part: str, function: Callable[[Context], None], context: Context) -> dict[str, Any]:
    """Run one part in a forked process with a time limit. Return its rows."""
    begin = time.monotonic()
    (context.output / f"{part}.json").unlink(missing_ok=True)  # rows of an earlier call
    stopped, status = _in_a_process(part, function, context)
    while part in SKIPPING and status == LOST and context.left > 1:  # the rows that are left
        stopped, status = _in_a_process(part, function, context)
    rows = context.read()
    rows["seconds"] = round(time.monotonic() - begin, 1)
    if stopped:
        rows["stopped"] = f"after {rows['seconds']} s, the part's limit"
    elif status and "failed" not in rows:
        rows["failed"] = f"The process ended with status {status}."
    return rows


def _in_a_process(part: str, function: Callable[[Context], None], context: Context) -> tuple[bool, int | None]:
    """Return whether the part had to be stopped, and its status."""
    process = multiprocessing.get_context("fork").Process(target=run_part, args=(part, function, context))
    process.start()
    try:
        process.join(max(1.0, context.left))
        stopped = process.is_alive()
    finally:
        if process.is_alive() and process.pid is not None:
            # in the meantime it would be a zombie, which counts as a member of its group
            ending = threading.Thread(target=end_group, args=(process.pid,))
            ending.start()
            process.join()
            ending.join()
    return stopped, process.exitcode


def unfinished(results: dict[str, Any]) -> list[str]:
    """List the rows within which a part was stopped. Its time was too short, or something hangs."""
    return [line for part, rows in results["parts"].items() for line in _marked(part, rows, UNFINISHED)]


def failures(results: dict[str, Any]) -> list[str]:
    """List the parts and rows that failed. A part that was stopped for time did not fail."""
    found = []
    for part, rows in results["parts"].items():
        if "failed" in rows:
            found.append(part)
        found += _marked(part, rows, "failed")
    return found


def _marked(part: str, rows: dict[str, Any], mark: str) -> list[str]:
    return [f"{part}: {name}" for name, row in rows.items() if isinstance(row, dict) and row.get(mark)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (8)")
    parser.add_argument("--output", type=Path, required=True, help="folder of results.json and the logs")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help="default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="smallest networks and fewest steps, for a rehearsal")
    parser.add_argument("--pay", type=Path, help="folder with a study to continue; see docs/internals/performance.md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    begin = time.monotonic()
    end = begin + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    output = arguments.output.resolve()
    os.environ["nnUNet_def_n_proc"] = "1"
    results: dict[str, Any] = {"device": arguments.device, "tiny": arguments.tiny, "parts": {}}
    file = output / "results.json"
    if arguments.only != list(LIMITS) and file.is_file():  # the other parts of an earlier call stay
        results["parts"] = json.loads(file.read_text())["parts"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        parts = functions()
        for part in (name for name in LIMITS if name in arguments.only):
            now = time.monotonic()
            limit = 60 * arguments.minutes if arguments.tiny else LIMITS[part] * arguments.minutes / 8
            deadline = min(end, now + limit)
            if deadline - now < 1:
                results["parts"][part] = {"stopped": "before it began, no time left"}
                continue
            context = Context(part, output, Path(scratch), arguments.device, arguments.tiny, deadline, arguments.pay)
            print(f"{part} ...", flush=True)
            results["parts"][part] = rows = supervise(part, parts[part], context)
            print(f"{part}: {rows['seconds']} s, {rows.get('stopped') or rows.get('failed') or 'done'}", flush=True)
            results["seconds"] = round(time.monotonic() - begin, 1)
            file.write_text(json.dumps(results, indent=1) + "\n")
    failed, open_ = failures(results), unfinished(results)
    print(f"{file}; failed: {', '.join(failed) or 'nothing'}")
    if open_:
        print(f"unfinished, for want of time or since it hangs: {', '.join(open_)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
