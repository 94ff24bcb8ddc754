"""Measure CPU and wall seconds, and print medians with their ranges."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Cost(NamedTuple):
    """CPU and wall seconds of one call."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Figure:
    """All values of one figure of a table, shown as the median and the range."""

    values: tuple[float, ...]
    digits: int = 3

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, middle, high = (f"{v:,.{self.digits}f}" for v in (min(self.values), self.median, max(self.values)))
        return middle if len(self.values) == 1 else f"{middle} ({low} to {high})"


def once(function: Callable[[], object], device: torch.device | None = None) -> Cost:
    """Return the cost of one call, the device's work included."""
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[Cost]]:
    """Time functions in turns, so that other load meets all of them alike.

    Args:
        functions: What to time, by name.
        repeats: How often each is timed.
        warm_up: Rounds before that do not count.
        device: Device to wait for.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            cost = once(function, device)
            if repeat >= warm_up:
                costs[name].append(cost)
    return costs


def ratios(a: Sequence[Cost], b: Sequence[Cost], what: str = "cpu") -> Figure:
    """Return ``a`` over ``b``, turn by turn."""
    return Figure(tuple(getattr(x, what) / getattr(y, what) for x, y in zip(a, b, strict=True)), 3)


def cpu(costs: Iterable[Cost], *, per: float = 1, digits: int = 4) -> Figure:
    """Return CPU seconds, divided by ``per``."""
    return Figure(tuple(cost.cpu / per for cost in costs), digits)


def rate(costs: Iterable[Cost], samples: float, *, wall: bool = False, digits: int = 1) -> Figure:
    """Return samples a CPU second or, with ``wall``, a second."""
    return Figure(tuple(samples / (cost.wall if wall else cost.cpu) for cost in costs), digits)


def machine() -> dict[str, Any]:
    """Describe the machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parser(description: str | None, repeats: int | None = 5) -> argparse.ArgumentParser:
    """Make a parser with --json and, where something is timed, --repeats."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", action="store_true", help="print all values as JSON")
    if repeats is not None:
        result.add_argument("--repeats", type=int, default=repeats, help=f"how often each is measured ({repeats})")
    return result


def report(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print rows with equal keys as a Markdown table or as JSON."""
    if as_json:
        plain = [{k: list(v.values) if isinstance(v, Figure) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"machine": machine(), "rows": plain}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
