"""Count the kernels of a training step that run outside the network.

    python -m benchmarks launches [METHOD ...] [--compiled]

A GPU pays about 5 microseconds for each. Counted is one step of a real trainer, batch 2 at 64^3, float32. The count is
made on the CPU: tensors answer that they are on a GPU, so that the code of a GPU runs. Every operation that computes or
copies counts. Operations of the network's modules and of their backward pass are left out. Views of memory and
allocations are no kernels. Operations on draws that stay on the host do not count, each copy of draws to the device
does.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.measure import parser, report
from benchmarks.views import views_of
from benchmarks.workload import start_trainer, write_dataset
from nnssl_ext.methods import METHODS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
#: Operations that allocate or describe memory, by the first part of their name.
FREE = (
    "detach", "empty", "new_empty", "_unsafe_view", "set_", "resize_", "lift_fresh", "is_same_size", "is_pinned",
    "_pin_memory", "_reshape_alias", "alias", "sym_", "_local_scalar_dense", "record_stream",
)  # fmt: skip
#: Operations for which the host waits.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
PHASES = ("views", "forward", "backward", "update")
#: No method may issue more.
LIMITS = {
    "volume_fusion": 372,
    "masked_autoencoder": 119,
    "contrastive_predictive_coding": 424,
    "models_genesis": 113,
    "rotation": 168,
    "jigsaw": 104,
    "relative_patch_location": 106,
    "exemplar": 295,
    "variable_dimension_transform": 159,
    "dino": 749,
}
SMALL_DINO = {"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 128}


class PretendGPU(TorchFunctionMode):
    """Let tensors answer that they are on a GPU while they are computed on the CPU.

    A tensor is on the host if it was made without a device, or from tensors on the host alone.
    """

    def __init__(self, counter: Kernels) -> None:
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if function == Tensor.device.__get__:
            return CPU if on_host(arguments[0]) else GPU
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not on_host(arguments[0])
        if function == Tensor.pin_memory:
            return arguments[0]
        flat = [value for value in tree_flatten((arguments, options))[0] if value is not None]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        named = [torch.device(value) for value in flat if isinstance(value, (torch.device, str)) and is_device(value)]
        arguments, options = tree_map(replaced, (arguments, options))
        host = all(map(on_host, tensors)) if tensors else True
        if named:
            if host and named[-1].type != "cpu" and (tensors or function in (torch.tensor, torch.as_tensor)):
                self.counter.note("upload")
            if self.counter.phase in ("views", "forward"):  # torch's own clipping names the true device
                if tensors and not host and named[-1].type == "cpu":
                    self.counter.wait("to the host")
                host = named[-1].type == "cpu"
        with self.counter.on_host(host):
            result = function(*arguments, **options)
            if function == Tensor.to and result is arguments[0]:  # on a GPU it would be another tensor
                result = result.detach()
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                value.host = host  # type: ignore[attr-defined]
        return result


def on_host(tensor: Tensor) -> bool:
    """Return whether a tensor is said to be on the host."""
    return bool(getattr(tensor, "host", False))


def is_device(value: torch.device | str) -> bool:
    """Return whether a value names a device."""
    return isinstance(value, torch.device) or value.partition(":")[0] in ("cpu", "cuda")


def replaced(value: Any) -> Any:
    """Replace the GPU by the CPU in an argument."""
    return CPU if isinstance(value, (torch.device, str)) and is_device(value) else value


class Kernels(TorchDispatchMode):
    """Count the kernels outside the network, by phase of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self.waits: Counter[str] = Counter()
        self.phase, self.inside, self.host = "views", 0, False
        self.network: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not (self.host or self.inside or self._network_gradient()):
            if name.startswith(WAITS):
                self.wait(name)
            if not (function.is_view or name.startswith(FREE)):
                self.note(name)
        return function(*arguments, **(options or {}))

    def note(self, name: str) -> None:
        """Count one kernel."""
        if not self.inside:
            self.counts[self.phase][name] += 1

    def wait(self, name: str) -> None:
        """Count one wait of the host."""
        self.waits[f"{self.phase}: {name}"] += 1

    @contextmanager
    def on_host(self, host: bool) -> Iterator[None]:
        """Count nothing within if the operands are on the host."""
        before, self.host = self.host, host
        try:
            yield
        finally:
            self.host = before

    def _network_gradient(self) -> bool:
        """Return whether a backward operation belongs to the network's modules."""
        node = torch._C._current_autograd_node()
        if node is None:
            return False
        number = node._sequence_nr()
        return number > 2**62 or any(first <= number < last for first, last in self.network)

    def enter(self, *_: Any) -> None:
        """Begin a module of the network."""
        if not self.inside:
            self.network.append((torch._C._autograd._get_sequence_nr(), 0))
        self.inside += 1

    def leave(self, *_: Any) -> None:
        """End a module of the network."""
        self.inside -= 1
        if not self.inside:
            self.network[-1] = (self.network[-1][0], torch._C._autograd._get_sequence_nr())


def count_step(name: str, root: Path, *, validation: bool = False) -> Kernels:
    """Count one step of a method's trainer on a data set of its own, in training or validation."""
    trainer = begin(name, root)
    kernels = Kernels()
    for network in (m for m in trainer.method.modules() if type(m) is type(trainer.network)):
        for module in network.modules():
            module.register_forward_pre_hook(kernels.enter)
            module.register_forward_hook(kernels.leave, always_call=True)
    batches = iter(trainer.dataloader_train)
    trainer.train_step(next(batches))  # the first step makes the optimizer's state
    batch = next(batches)
    for row in batch.boxes:
        for box in row:
            box.data.host = True
    trainer.device = GPU
    if validation:
        trainer.method.eval()
    with phases(trainer, kernels), pretend(kernels), torch.set_grad_enabled(not validation):
        (trainer.validation_step if validation else trainer.train_step)(batch)
    return kernels


def count_compiled(name: str, root: Path) -> tuple[int, int]:
    """Count the kernels of the compiled objective around the network: forward and backward."""
    from torch._inductor import config
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
    from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler
    from torch._inductor.virtualized import V

    trainer = begin(name, root)
    method, batch = trainer.method, next(iter(trainer.dataloader_train))
    for network in (m for m in method.modules() if type(m) is type(trainer.network)):
        for part in (network, *network.children(), *network.encoder.stages):
            part.forward = torch.compiler.disable(part.forward)
    counts, compile_graph = {False: 0, True: 0}, Scheduler.codegen

    def counted(graph: Any) -> Any:
        for node in graph.nodes:
            # a CPU joins some kernels once more, a GPU does not
            parts = node.get_outer_nodes() if isinstance(node, OuterLoopFusedSchedulerNode) else [node]
            backward = V.graph.is_backward
            counts[backward] += len(parts) * (not isinstance(node, NopKernelSchedulerNode))
        return compile_graph(graph)

    torch._dynamo.reset()
    views = views_of(method, batch, CPU)
    with patch.object(Scheduler, "codegen", counted), config.patch(fx_graph_cache=False):
        torch.compile(method)(views)["loss"].mean().backward()
    return counts[False], counts[True]


class HostGenerator(torch.Generator):
    """A generator on the CPU, whatever device is asked for."""

    def __new__(cls, *_: Any) -> HostGenerator:
        return super().__new__(cls)


@contextmanager
def pretend(kernels: Kernels) -> Iterator[None]:
    """Count kernels within, with all that makes or moves tensors told apart by device."""
    from_numpy = torch.from_numpy

    def flagged(array: Any) -> Tensor:
        result = from_numpy(array)
        result.host = True  # type: ignore[attr-defined]
        return result

    with (
        patch.object(torch, "Generator", HostGenerator),
        patch.object(torch, "from_numpy", flagged),
        PretendGPU(kernels),
        kernels,
    ):
        yield


@contextmanager
def phases(trainer: Any, kernels: Kernels) -> Iterator[None]:
    """Switch the counter's phase where a step passes from one to the next."""

    def after(function: Any, phase: str) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            kernels.phase = phase
            return result

        return wrapped

    handle = trainer.method.register_forward_hook(lambda *_: setattr(kernels, "phase", "backward"))
    views = patch.object(trainer.method, "views", after(trainer.method.views, "forward"))
    with views, patch.object(Tensor, "backward", after(Tensor.backward, "update")):
        yield
    handle.remove()


def begin(name: str, root: Path) -> Any:
    """Start a pretraining with few prototypes on a data set of its own."""
    settings = {"precision": "float32", "iterations_per_epoch": 100, "dino": SMALL_DINO}
    return start_trainer(write_dataset(root / name, "counted", settings), name, CPU)


def main() -> None:
    options = parser(__doc__, repeats=None)
    options.add_argument("methods", nargs="*", help="default: all")
    options.add_argument("--operations", action="store_true", help="print the counts of each operation")
    options.add_argument("--compiled", action="store_true", help="count what torch.compile makes of the objective")
    arguments = options.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.methods or METHODS:
            kernels = count_step(name, Path(folder))
            parts = {phase: sum(kernels.counts[phase].values()) for phase in PHASES}
            if arguments.compiled:
                parts["forward"], parts["backward"] = count_compiled(name, Path(folder, "compiled"))
            waits = sum(kernels.waits.values())
            rows.append({"method": name, **parts, "all": sum(parts.values()), "host waits": waits})
            if arguments.operations:
                for phase in PHASES:
                    print(name, phase, dict(kernels.counts[phase].most_common()))
                print(name, "host waits", dict(kernels.waits))
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
