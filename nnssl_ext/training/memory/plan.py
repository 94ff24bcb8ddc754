"""Plan the batch for a GPU memory.

B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, Method
from nnssl_ext.networks.base import Triple, triple
from nnssl_ext.settings import PLANS_KEY, unknown_name
from nnssl_ext.training.memory.estimate import GIB, StepMemory, planned, planned_memory, step_memory


@dataclass(frozen=True)
class Need:
    """The memory of a method's steps in one configuration.

    Attributes:
        configuration: Its name.
        method: What pretrains.
        memory: Of a step.
        batch: Samples of a step.
        crop: Edges of a sample.
    """

    configuration: str
    method: type[Method]
    memory: StepMemory
    batch: int
    crop: Triple

    def line(self, target: float | None = None) -> str:
        """Describe the need in one line. ``target`` in bytes."""
        sizes = f"batch {self.batch} of {' x '.join(map(str, self.crop))}"
        needs, more = (self.memory.peak(batch) / GIB for batch in (self.batch, self.batch + 1))
        text = f"{self.configuration}: {self.method.title} needs {needs:.1f} GiB at {sizes}, {more - needs:.2f} each"
        return text if target is None else f"{text}; {self.memory.largest_batch(target)} fit {target / GIB:g} GiB"


def wanted_methods(names: Sequence[str] | None, plans: dict) -> list[type[Method]]:
    """Return the requested methods. Default: those that the plans configure, else VolumeFusion."""
    for name in names or ():
        if name not in METHODS:
            raise UserError(unknown_name("method", name, list(METHODS), "--method"))
    chosen = names or [name for name in METHODS if name in plans.get(PLANS_KEY, {})] or [next(iter(METHODS))]
    return [METHODS[name] for name in dict.fromkeys(chosen)]


def needs_of(plans: dict, configurations: Sequence[str], methods: Sequence[type[Method]], dataset: dict) -> list[Need]:
    """Estimate the memory of each method in each configuration."""
    needs, precision = [], plans.get(PLANS_KEY, {}).get("precision", "auto")
    for configuration, method in product(configurations, methods):
        build, settings, geometry = planned(method, plans, configuration, dataset)
        memory = step_memory(method, build, settings, geometry, precision)
        needs.append(Need(configuration, method, memory, geometry.batch_size, triple(geometry.crop_size)))
    return needs


def fitting_batch(needs: Sequence[Need], target: float, named: int | None, plans: dict, dataset: dict) -> int:
    """Return the largest batch that fits, at most ``named``. The smallest batch of a method must."""
    largest = [need.memory.largest_batch(target) for need in needs]
    for need, batch in zip(needs, largest, strict=True):
        if batch < need.method.min_batch_size:
            raise UserError(_nothing_fits(need, target, plans, dataset))
    return min([*largest, *filter(None, [named])])


def _nothing_fits(need: Need, target: float, plans: dict, dataset: dict) -> str:
    least = need.method.min_batch_size
    change = ["a smaller crop_size", "fewer features (architecture.features_base, architecture.features_max)"]
    if not plans.get(PLANS_KEY, {}).get("activation_checkpointing"):
        twice = planned_memory(need.method, plans, need.configuration, dataset, checkpointing=True)
        change.append(f"activation_checkpointing=true ({twice.peak(least) / GIB:.1f} GiB)")
    return (
        f"not even batch {least} of {need.method.title} fits --gpu-memory-target {target / GIB:g}: configuration "
        f"{need.configuration} needs an estimated {need.memory.peak(least) / GIB:.1f} GiB; use {', '.join(change)}, or "
        f"more memory"
    )
