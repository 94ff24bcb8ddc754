"""What the benchmarks measure with: CPU and wall seconds, medians with their ranges, and the machine."""

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
    """What one call took."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Figure:
    """One figure of a table: all its values, shown as the median and the range."""

    values: tuple[float, ...]
    digits: int = 3

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, middle, high = (f"{v:,.{self.digits}f}" for v in (min(self.values), self.median, max(self.values)))
        return middle if len(self.values) == 1 else f"{middle} ({low} to {high})"


def once(function: Callable[[], object], device: torch.device | None = None) -> Cost:
    """The cost of one call, to its end on the device too."""
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
    """Call all of them in turns, so that whatever else the machine does meets all alike; warm-ups do not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            cost = once(function, device)
            if repeat >= warm_up:
                costs[name].append(cost)
    return costs


def ratios(a: Sequence[Cost], b: Sequence[Cost], what: str = "cpu") -> Figure:
    """Turn by turn, ``a`` over ``b``."""
    return Figure(tuple(getattr(x, what) / getattr(y, what) for x, y in zip(a, b, strict=True)), 3)


def cpu(costs: Iterable[Cost], *, per: float = 1, digits: int = 4) -> Figure:
    """CPU seconds, divided by ``per``."""
    return Figure(tuple(cost.cpu / per for cost in costs), digits)


def rate(costs: Iterable[Cost], samples: float, *, wall: bool = False, digits: int = 1) -> Figure:
    """Samples a second: of one core's time, or of the clock's."""
    return Figure(tuple(samples / (cost.wall if wall else cost.cpu) for cost in costs), digits)


def machine() -> dict[str, Any]:
    """Where the figures are from."""
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
    """A benchmark's options: --json and, where something is timed, --repeats; its own come on top."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", action="store_true", help="print all values as JSON")
    if repeats is not None:
        result.add_argument("--repeats", type=int, default=repeats, help=f"how often each is measured ({repeats})")
    return result


def report(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print a Markdown table (a row a mapping, all with the same keys), or everything as JSON."""
    if as_json:
        plain = [{k: list(v.values) if isinstance(v, Figure) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"machine": machine(), "rows": plain}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
