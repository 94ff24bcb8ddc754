"""Time a training step, its parts, and its ratio to the bare forward and backward pass.

    OMP_NUM_THREADS=2 python -m benchmarks step [METHOD ...] [--plan hippocampus plain96 residual128] [--batch 2]
    python -m benchmarks step volume_fusion --device cuda --workers 2 --plan residual128
    python -m benchmarks step volume_fusion --batch 2 --steps 500

A real trainer runs on a data set made for it. "full" is everything between two steps: waiting for the batch, views,
forward, backward, clipping, optimizer, guard. "bare" is the forward and backward pass of the same network in the same
precision on the same image, from a gradient of ones. Both take turns. Methods that do not run their network on one
image have no bare step. The split waits for the device after each part, which a full step does not.

--repeats 0 times only the first step, for steps that take minutes. --steps N prints the resident memory after each
fifth of N steps.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Cost, Figure, in_turns, parser, ratios, report
from benchmarks.workload import PLANS, start_trainer, write_dataset, write_images
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import METHODS

PARTS = ("load", "views", "forward", "backward", "optimizer")


class Watch:
    """Seconds of the parts of a step: CPU seconds, on a GPU wall seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, False
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that it is timed while the watch is on."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if not self.on:
                return function(*arguments, **options)
            begin = self._now()
            result = function(*arguments, **options)
            self.spent[name] += self._now() - begin
            return result

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


class Run:
    """A trainer between two steps."""

    def __init__(self, folder: Path, method: str, device: torch.device) -> None:
        self.trainer = start_trainer(folder, method, device)
        self.image: Tensor | None = None
        self.trainer.network.register_forward_pre_hook(self._keep)
        self.watch = Watch(device)
        trainer, part = self.trainer, self.watch.part
        trainer.method.views = part("views", trainer.method.views)
        trainer.objective = part("forward", trainer.objective)
        trainer.optimizer.step = part("optimizer", trainer.optimizer.step)
        self.next = part("load", lambda: next(trainer.dataloader_train))

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self.image = inputs[0].detach()

    def full(self) -> None:
        """Do one step."""
        batch: CropBatch = self.next()
        self.trainer.train_step(batch)

    def bare(self) -> None:
        """Do the forward and backward pass of the network alone."""
        trainer, image = self.trainer, self.image
        assert image is not None
        trainer.optimizer.zero_grad(set_to_none=True)
        mixed = torch.autocast(trainer.device.type, trainer.amp_dtype) if trainer.amp_dtype else nullcontext()
        with mixed:
            outputs = trainer.network(image)
        outputs = [o for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    @contextmanager
    def split(self) -> Iterator[dict[str, float]]:
        """Time the parts of the steps within."""
        backward, self.watch.on = Tensor.backward, True
        Tensor.backward = self.watch.part("backward", backward)  # type: ignore[method-assign]
        self.watch.spent.update(dict.fromkeys(PARTS, 0.0))
        try:
            yield self.watch.spent
        finally:
            Tensor.backward, self.watch.on = backward, False  # type: ignore[method-assign]


def measure(method: str, plan: str, arguments: Any, device: torch.device) -> dict[str, object]:
    """Return the row of a method on a plan."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "precision": arguments.precision,
            "memory_format": arguments.memory_format,
            "iterations_per_epoch": 100_000,
            "epochs": 1,
        }
        if METHODS[method].learns_from != "cases":
            write_images(Path(folder) / "images")
            settings["images"] = str(Path(folder) / "images")
        run = Run(write_dataset(Path(folder), plan, settings, batch=arguments.batch), method, device)
        turns: dict[str, Callable[[], object]] = {"full": run.full}
        if arguments.repeats:
            for _ in range(3):
                run.full()
            if run.image is not None and tuple(run.image.shape[2:]) == tuple(PLANS[plan]["patch"]):
                turns["bare"] = run.bare
        warm_up = 1 if arguments.repeats else 0
        costs = in_turns(turns, max(1, arguments.repeats), warm_up=warm_up, device=device)
        row = {"method": METHODS[method].title, "plan": plan, "batch": run.trainer.batch_size}
        row |= _figures(costs, device, run.trainer.batch_size)
        if arguments.repeats:
            row |= _split(run, arguments.repeats)
        if arguments.steps:
            row["memory"] = _memory(run, arguments.steps, device)
        run.trainer.dataloader_train = run.trainer.dataloader_val = None
        return row


def _split(run: Run, repeats: int) -> dict[str, str]:
    """Return the share of each part in some more steps."""
    with run.split() as spent:
        begin = run.watch._now()
        for _ in range(repeats):
            run.full()
        total = run.watch._now() - begin
    shares = {name: f"{100 * seconds / total:.1f} %" for name, seconds in spent.items()}
    return {**shares, "rest": f"{100 * (1 - sum(spent.values()) / total):.1f} %"}


def _figures(costs: dict[str, list[Cost]], device: torch.device, batch: int) -> dict[str, object]:
    full, unit = costs["full"], "wall" if device.type == "cuda" else "cpu"
    ratio = ratios(full, costs["bare"], unit) if "bare" in costs else "no bare"
    return {
        "CPU s a step": Figure(tuple(c.cpu for c in full), 3),
        "wall s": Figure(tuple(c.wall for c in full), 3),
        "samples/s": Figure(tuple(batch / c.wall for c in full), 2),
        "full / bare": ratio,
    }


def _memory(run: Run, steps: int, device: torch.device) -> str:
    """Return the resident memory after each fifth of the steps."""
    figures = []
    for _ in range(5):
        for _ in range(steps // 5):
            run.full()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures.append(f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:,.0f}")
    text = f"{', '.join(figures)} MiB"
    return text + (f", GPU peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else "")


def main() -> None:
    options = parser(__doc__, repeats=7)
    options.add_argument("methods", nargs="*", metavar="METHOD", help="default: volume_fusion masked_autoencoder")
    options.add_argument("--plan", nargs="+", choices=PLANS, default=["hippocampus"])
    options.add_argument("--batch", type=int, help="default: the plan's")
    options.add_argument("--precision", default="auto", help="as the setting nnssl_ext.precision (auto)")
    options.add_argument("--memory-format", default="auto", help="as the setting nnssl_ext.memory_format (auto)")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--workers", type=int, default=0, help="processes that read (0)")
    options.add_argument("--steps", type=int, default=0, help="also look at the memory over so many steps")
    arguments = options.parse_args()
    methods = arguments.methods or ["volume_fusion", "masked_autoencoder"]
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        options.error(f"unknown method '{unknown[0]}'; known: {', '.join(METHODS)}")
    os.environ |= {"nnUNet_n_proc_DA": str(arguments.workers), "nnUNet_compile": "f"}  # as the bare network
    device = torch.device(arguments.device)
    rows = [measure(method, plan, arguments, device) for plan in arguments.plan for method in methods]
    report([{**dict.fromkeys(rows[0]), **row} for row in rows], arguments.json)


if __name__ == "__main__":
    main()
