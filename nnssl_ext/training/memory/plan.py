"""Plan the batch for a GPU memory.

B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, Method
from nnssl_ext.settings import PLANS_KEY, unknown_name
from nnssl_ext.training.memory.estimate import GIB, StepMemory, planned_memory


@dataclass(frozen=True)
class Need:
    """The memory of a method's steps in one configuration.

    Attributes:
        configuration: Its name.
        method: What pretrains.
        memory: Of a step.
    """

    configuration: str
    method: type[Method]
    memory: StepMemory

    def line(self, batch: int, target: float | None = None) -> str:
        """Describe the need in one line. ``target`` in bytes."""
        needs, each = self.memory.peak(batch) / GIB, (self.memory.peak(batch + 1) - self.memory.peak(batch)) / GIB
        text = f"{self.configuration}: {self.method.title} needs {needs:.1f} GiB at batch {batch}, {each:.2f} a sample"
        return text if target is None else f"{text}; {self.memory.largest_batch(target)} fit {target / GIB:g} GiB"


def wanted_methods(names: Sequence[str] | None, plans: dict) -> list[type[Method]]:
    """Return the requested methods.

    Default: those that the plans configure, else VolumeFusion.

    Raises:
        UserError: For an unknown name.
    """
    for name in names or ():
        if name not in METHODS:
            raise UserError(unknown_name("method", name, list(METHODS), "--method"))
    chosen = names or [name for name in METHODS if name in plans.get(PLANS_KEY, {})] or [next(iter(METHODS))]
    return [METHODS[name] for name in dict.fromkeys(chosen)]


def needs_of(plans: dict, configurations: Sequence[str], methods: Sequence[type[Method]], dataset: dict) -> list[Need]:
    """Estimate the memory of each method in each configuration."""
    return [
        Need(configuration, method, planned_memory(method, plans, configuration, dataset))
        for configuration in configurations
        for method in methods
    ]


def fitting_batch(needs: Sequence[Need], target: float, plans: dict, dataset: dict) -> int:
    """Return the largest batch that fits, at most the plans' own.

    Raises:
        UserError: If not even the smallest batch of a method fits.
    """
    largest = [need.memory.largest_batch(target) for need in needs]
    for need, batch in zip(needs, largest, strict=True):
        if batch < need.method.min_batch_size:
            raise UserError(_nothing_fits(need, target, plans, dataset))
    return min([*largest, *filter(None, [plans.get(PLANS_KEY, {}).get("batch_size")])])


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
