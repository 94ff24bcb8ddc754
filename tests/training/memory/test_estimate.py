"""The estimate of a step's memory, against real steps on the CPU and against itself."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nnssl_ext.methods import METHODS, DataGeometry
from nnssl_ext.networks.backbone import Backbone, backbone_of
from nnssl_ext.training.memory import estimate as memory
from nnssl_ext.training.memory.estimate import GIB, RESERVE, Line, StepMemory, planned_memory, step_memory
from nnssl_ext.training.memory.trace import empty, trace_step, without_memory
from tests.datasets import KINDS, OWN_NETWORKS, make_labels, make_plans
from tests.methods.helpers import SIZE
from tests.support.networks import network

SMALL = {"dino": {"local_crops": 1, "hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 64}}


def dataset(kind: str) -> dict:
    channels = 2 if kind == "two_channel" else 1
    return {"channel_names": {str(c): "MR" for c in range(channels)}, "file_ending": ".nii.gz", **make_labels(kind)}


def estimate(kind: str, method: str = "volume_fusion", settings: dict | None = None, **options: Any) -> StepMemory:
    plans = {**make_plans(kind), "nnssl_ext": {**SMALL, **(settings or {})}}
    return planned_memory(METHODS[method], plans, "3d_fullres", dataset(kind), **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_estimate(method: str) -> None:
    found = estimate("plain", method)
    assert found.gradients > 0
    assert found.weights >= found.gradients
    assert found.optimiser == 2 * found.gradients  # AdamW
    assert found.kept.each > 0
    assert found.allocated(4) > found.allocated(2) > found.weights + found.optimiser


def test_a_teacher_and_momentum_are_counted() -> None:
    dino = estimate("plain", "dino")
    assert dino.weights > 1.8 * dino.gradients
    sgd = estimate("plain", settings={"volume_fusion": {"optimizer": "sgd"}})
    assert sgd.optimiser == sgd.gradients


@pytest.mark.parametrize("kind", ["plain", "residual", *OWN_NETWORKS])
@pytest.mark.integration
def test_activation_checkpointing_and_precision_lower_it(kind: str) -> None:
    own = estimate(kind)
    assert estimate(kind, checkpointing=True).kept.each < 0.85 * own.kept.each
    assert estimate(kind, settings={"activation_checkpointing": True}).kept.each < 0.85 * own.kept.each
    assert estimate(kind, settings={"precision": "float32"}).kept.each > 1.4 * own.kept.each


def test_a_formula_for_any_batch() -> None:
    moments = (Line(10 * GIB, 0.0), Line(0.0, GIB))
    need = StepMemory(weights=GIB, gradients=GIB, optimiser=2 * GIB, kept=Line(0, GIB), moments=moments)
    assert need.allocated(4) == 13 * GIB
    assert need.allocated(12) == 15 * GIB
    for batch in (10, 12, 100):
        assert need.largest_batch(need.peak(batch)) in (batch, batch - 1)  # rounding
        assert need.largest_batch(need.peak(batch) + 1024) == batch
    assert need.largest_batch(need.peak(1) - 1024) == 0
    assert need.largest_batch(RESERVE / 2) == 0


def test_the_line_meets_other_batches() -> None:
    built, found = built_on("residual"), estimate("residual")
    one, two = (memory.view_shapes(built, batch) for batch in (1, 2))
    assert memory.shapes_at(one, two, 5) == memory.view_shapes(built, 5)
    with without_memory() as live:
        empty(built)
        trace = trace_step(built, memory.shapes_at(one, two, 5), live, torch.bfloat16)
    assert trace.kept == pytest.approx(found.kept.at(5), rel=0.01)
    assert trace.backward == pytest.approx(found.moments[1].at(5), rel=0.01)


def built_on(kind: str) -> Any:
    """VolumeFusion on a network of a kind."""
    method = METHODS["volume_fusion"]
    backbone = backbone_of(network(kind, 1, 5))
    geometry = DataGeometry(SIZE, (1.0, 1.0, 1.0), 1, tuple(backbone.strides))
    return method(backbone, memory.quiet(method.Settings()), geometry).train()


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_it_is_what_a_real_step_takes(kind: str) -> None:
    """In float32 on the CPU, by torch's own account of every allocation; its kernels' workspaces are the difference, of
    which those that sort for a scatter weigh most on crops as small as these."""
    torch.manual_seed(0)
    method = built_on(kind)
    shapes = memory.view_shapes(method, 2)
    views = {
        name: torch.rand(shape) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    method(views)["loss"].sum().backward()  # what is allocated once
    method.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method(views)["loss"].sum().backward()
    real = peak_of(profiler)
    with without_memory() as live:
        empty(method)
        trace = trace_step(method, shapes, live, None)
    given = sum(view.nbytes for view in views.values())
    counted = max(trace.forward, trace.backward) - given
    assert 0.8 * real < counted < 1.05 * real


def peak_of(profiler: Any) -> int:
    """The most bytes that were allocated at once since the profile began."""
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_nothing_of_a_method_is_left_changed() -> None:
    state = torch.random.get_rng_state()
    before = torch.nn.functional.scaled_dot_product_attention
    estimate("vit")
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_kinds_of_plans() -> None:
    for kind in (*KINDS, *OWN_NETWORKS):
        assert estimate(kind).kept.each > 0, kind


def test_heads_follow_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int | None] = []
    real = step_memory

    def spy(method: Any, build: Any, *rest: Any) -> StepMemory:
        def noted(outputs: int | None) -> Backbone:
            wanted.append(outputs)
            return build(outputs)

        return real(method, noted, *rest)

    monkeypatch.setattr(memory, "step_memory", spy)
    estimate("plain", settings={"volume_fusion": {"levels": 7}})
    assert wanted == [8]
