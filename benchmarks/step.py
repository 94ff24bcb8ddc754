"""Time a training step, its parts, and its ratio to the bare forward and backward pass.

    OMP_NUM_THREADS=2 python -m benchmarks step [METHOD ...] [--plan hippocampus plain96 residual128] [--batch 2]
    python -m benchmarks step volume_fusion --device cuda --workers 2 --plan residual128
    python -m benchmarks step volume_fusion --batch 2 --steps 500

A real trainer runs on a data set made for it. "full" is everything between two steps: waiting for the batch, views,
forward, backward, clipping, optimizer, guard. "bare" is the forward and backward pass of the same network in the same
precision on the same image, from a gradient of ones. Both take turns. Methods that do not run their network on one
image have no bare step. The split waits for the device after each part, which a full step does not.

--steps N prints the resident memory after each fifth of N steps.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Figure, cpu, in_turns, parser, rate, ratios, report
from benchmarks.workload import PLANS, start_trainer, write_dataset
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
            begin = self.now()
            result = function(*arguments, **options)
            self.spent[name] += self.now() - begin
            return result

        return timed

    def now(self) -> float:
        """Return the seconds so far."""
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

    def shares(self, repeats: int) -> dict[str, float]:
        """Return the share of each part in some more steps."""
        backward, spent, self.watch.on = Tensor.backward, self.watch.spent, True
        Tensor.backward = self.watch.part("backward", backward)  # type: ignore[method-assign]
        spent.update(dict.fromkeys(PARTS, 0.0))
        begin = self.watch.now()
        try:
            for _ in range(repeats):
                self.full()
            total = self.watch.now() - begin
        finally:
            Tensor.backward, self.watch.on = backward, False  # type: ignore[method-assign]
        return {part: seconds / total for part, seconds in spent.items()}


def measure(method: str, plan: str, arguments: Any, device: torch.device) -> dict[str, object]:
    """Return the row of a method on a plan."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"precision": arguments.precision, "memory_format": arguments.memory_format}
        run = Run(write_dataset(Path(folder), plan, settings, batch=arguments.batch), method, device)
        turns: dict[str, Callable[[], object]] = {"full": run.full}
        for _ in range(3):
            run.full()
        if run.image is not None and tuple(run.image.shape[2:]) == tuple(PLANS[plan]["patch"]):
            turns["bare"] = run.bare
        costs = in_turns(turns, arguments.repeats, device=device)
        full, unit, batch = costs["full"], "wall" if device.type == "cuda" else "cpu", run.trainer.batch_size
        shares = run.shares(arguments.repeats)
        shares["rest"] = 1 - sum(shares.values())
        row = {
            "method": METHODS[method].title,
            "plan": plan,
            "batch": batch,
            "CPU s a step": cpu(full, digits=3),
            "wall s": Figure(tuple(cost.wall for cost in full), 3),
            "samples/s": rate(full, batch, wall=True, digits=2),
            "full / bare": ratios(full, costs["bare"], unit) if "bare" in costs else "no bare",
            **{part: f"{100 * share:.1f} %" for part, share in shares.items()},
        }
        if arguments.steps:
            row["memory"] = _memory(run, arguments.steps, device)
        run.trainer.dataloader_train = run.trainer.dataloader_val = None
        return row


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
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
