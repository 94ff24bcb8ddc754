"""Estimate the GPU memory of a training step without a GPU.

What is counted is in docs/how-to/gpu-memory.md. B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import DataGeometry, Method
from nnssl_ext.networks.backbone import Backbone
from nnssl_ext.settings import PLANS_KEY
from nnssl_ext.training.checks import check_backbone, check_plans, target_backbone
from nnssl_ext.training.memory.trace import Shapes, empty, trace_step, without_memory
from nnssl_ext.training.optimization import STATES
from nnssl_ext.views.random import VIEWS, BatchRandom

#: Builds the view of a network with so many outputs; None is as many as the data set has.
Build = Callable[[int | None], Backbone]
GIB = 2**30
#: CUDA's context, the libraries' code and cuDNN's workspaces; not measured, see docs/how-to/gpu-memory.md.
RESERVE = 2 * GIB
#: Of what the step takes: blocks that the allocator holds and cannot use again; not measured.
FRAGMENTS = 0.1
#: A step is traced for these batches; between and beyond them bytes lie on a line.
TRACED = (2, 8)


class Line(NamedTuple):
    """Compute bytes as ``fixed`` and ``each`` a sample."""

    fixed: float
    each: float

    def at(self, batch: int) -> float:
        return self.fixed + self.each * batch


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step, in bytes.

    Attributes:
        weights: Parameters and buffers, a teacher's included.
        gradients: Of the parameters that are trained.
        optimiser: Its state.
        kept: What the forward pass keeps for the backward pass.
        moments: What is alive, beside weights and the optimiser's state, when most is: in the forward pass, in the
            backward pass, after it.
    """

    weights: int
    gradients: int
    optimiser: int
    kept: Line
    moments: tuple[Line, ...]

    def allocated(self, batch: int) -> float:
        """Return the peak of allocated tensors in a step."""
        return self.weights + self.optimiser + max(moment.at(batch) for moment in self.moments)

    def peak(self, batch: int) -> float:
        """Return the peak with the overhead of CUDA and the allocator."""
        return self.allocated(batch) * (1 + FRAGMENTS) + RESERVE

    def largest_batch(self, limit: float) -> int:
        """Return the largest batch within ``limit`` bytes, 0 without one."""
        room = (limit - RESERVE) / (1 + FRAGMENTS) - self.weights - self.optimiser
        if room < max(moment.at(1) for moment in self.moments):
            return 0
        return min(int((room - moment.fixed) / moment.each) for moment in self.moments if moment.each > 0)


def step_memory(
    method: type[Method], build: Build, settings: Any, geometry: DataGeometry, precision: str
) -> StepMemory:
    """Trace a method's step on tensors without memory.

    Args:
        method: What pretrains.
        build: The view of the network with so many outputs; None is the data set's.
        settings: The method's own.
        geometry: Crop, channels and, where known, the cases' size and the images' classes.
        precision: As in the settings; ``auto`` is that of a GPU, 16 bits.

    Raises:
        UserError: If the method cannot lay out its patches in cases of this size.
    """
    built = build_method(method, build, quiet(settings.heaviest()), geometry, torch.device("meta"))
    one, two = (view_shapes(built, batch) for batch in (1, 2))
    dtype = None if precision == "float32" else torch.bfloat16
    with without_memory() as live:
        empty(built)
        less, more = (trace_step(built, shapes_at(one, two, batch), live, dtype) for batch in TRACED)
    trained = _bytes(parameter for parameter in built.parameters() if parameter.requires_grad)
    return StepMemory(
        weights=_bytes(built.parameters()) + _bytes(built.buffers()),
        gradients=trained,
        optimiser=STATES[built.optimizer().name] * trained,
        kept=_line(less.kept, more.kept),
        moments=(
            _line(less.forward, more.forward),
            _line(less.backward, more.backward),
            _line(less.end, more.end),
        ),
    )


def build_method(
    method: type[Method], build: Build, settings: Any, geometry: DataGeometry, device: torch.device
) -> Method:
    """Build a method in training mode. The random generator keeps its state."""
    # heads draw their initial values
    with torch.random.fork_rng(devices=[]):
        with device:
            backbone = build(method.output_channels(settings, geometry))
        backbone.set_deep_supervision(method.deep_supervision)
        return method(backbone, settings, geometry).train()


def planned_memory(method: type[Method], plans: dict, configuration: str, dataset: dict, **known: Any) -> StepMemory:
    """Estimate the memory of a run's step. Arguments and errors are those of ``planned``."""
    precision = plans.get(PLANS_KEY, {}).get("precision", "auto")
    return step_memory(method, *planned(method, plans, configuration, dataset, **known), precision)


def planned(
    method: type[Method],
    plans: dict,
    configuration: str,
    dataset: dict,
    *,
    geometry: DataGeometry | None = None,
    checkpointing: bool | None = None,
) -> tuple[Build, Any, DataGeometry]:
    """Return the network's builder, the settings and the geometry.

    Args:
        method: What pretrains.
        plans, configuration, dataset: The run's.
        geometry: Where a run knows more than its plans; by default cases are as large as the plans' median.
        checkpointing: Instead of the plans' ``activation_checkpointing``.

    Raises:
        UserError: If the plans cannot be pretrained with, or not by this method.
    """
    common, settings, found, _ = check_plans(method, plans, configuration, dataset)
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    check_backbone(method, manager, configuration, found.channels)
    if geometry is None:
        depth, height, width = (round(edge) for edge in config.median_image_size_in_voxels)
        geometry = replace(found, case_size=(depth, height, width))
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    twice = common.activation_checkpointing if checkpointing is None else checkpointing

    def build(outputs: int | None) -> Backbone:
        return target_backbone(manager, config, found.channels, outputs or heads, twice)

    return build, settings, geometry


def quiet(settings: Any) -> Any:
    """Remove intensity views, which change no shape."""
    intensity = getattr(settings, "intensity", None)
    if intensity is None:
        return settings
    off = {field.name: 0.0 for field in fields(intensity) if field.name.endswith("_probability")}
    return replace(settings, intensity=replace(intensity, **off))


def view_shapes(method: Method, batch: int) -> Shapes:
    """Return shapes and types of a method's views."""
    request, indices = method.crops(method.settings, method.geometry), list(range(batch))
    samples = (request.placeholder(method.geometry.channels, number) for number in indices)
    boxes = [list(row) for row in zip(*samples, strict=True)]
    with torch.no_grad():
        views = method.views(CropBatch(indices, boxes), BatchRandom(0, VIEWS, indices, torch.device("cpu")))
    return {name: (tuple(view.shape), view.dtype) for name, view in views.items()}


def shapes_at(one: Shapes, two: Shapes, batch: int) -> Shapes:
    """Extrapolate shapes to a batch."""
    return {
        name: (tuple(a + (batch - 1) * (b - a) for a, b in zip(shape, two[name][0], strict=True)), kind)
        for name, (shape, kind) in one.items()
    }


def _line(less: int, more: int) -> Line:
    each = (more - less) / (TRACED[1] - TRACED[0])
    return Line(less - TRACED[0] * each, each)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
