from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnssl_ext.errors import UserError
from nnssl_ext.methods import DataGeometry
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.methods.dino.settings import DINOIntensitySettings, DINOSettings, local_size, resolved, view_voxels
from nnssl_ext.networks.base import Triple
from nnssl_ext.training.optimization import build_optimizer, set_rates
from nnssl_ext.views.appearance import IntensityDraw
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom
from tests.conftest import Environment
from tests.datasets import OWN_NETWORKS
from tests.methods.helpers import CPU, batch_of, build, views_of

Data = Callable[[str], Environment]
KINDS = ["plain", "residual", "anisotropic", *OWN_NETWORKS]
SMALL = replace(
    DINOSettings(),
    local_crops=2,
    hidden_dim=16,
    bottleneck_dim=8,
    prototypes=32,
    token_stride=4,
    freeze_prototypes=0.0,
    koleo_weight=0.1,
)
LEARNING = replace(
    SMALL,
    hidden_dim=128,
    bottleneck_dim=64,
    prototypes=256,
    mask_probability=1.0,
    mask_ratio=[0.2, 0.5],
    teacher_temperature=[0.03, 0.03],
)
#: Nothing that keeps the targets apart: they are never centred and hardly sharpened.
BROKEN = replace(LEARNING, center_momentum=1.0, teacher_temperature=[1.0, 1.0])


def trained(folder: Path, method: Any, steps: int, rate: float = 2e-3) -> list[float]:
    """Losses of a short training."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], rate)
    losses = []
    method.train()
    for step in range(steps):
        method.before_step(step / steps)
        loss = method(views_of(folder, method, list(range(4 * step, 4 * step + 4))))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.5)
        losses.append(loss.item())
    return losses


def validated(folder: Path, method: Any, batches: int = 4) -> dict[str, float]:
    """The measures of a validation."""
    method.eval()
    with torch.no_grad():
        for number in range(batches):
            indices = list(range(4 * number, 4 * number + 4))
            batch = batch_of(folder, method, indices)
            method(method.views(batch, BatchRandom(0, VALIDATION + VIEWS, indices, CPU)))
    measures: dict[str, float] = method.check_validation({}).measures
    assert method.check_validation({}).measures == {}
    return measures


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_encoder_and_heads_learn_and_nothing_else(folder: Path, kind: str) -> None:
    method = build(DINO, SMALL, kind=kind)
    result = method(views_of(folder, method, [0, 1, 2]))
    assert {name: value.shape for name, value in result.items()} == dict.fromkeys(
        ("loss", "image", "patch", "koleo"), (3,)
    )
    result["loss"].sum().backward()
    encoder = {id(p) for p in method.backbone.encoder_parameters()}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not (name.startswith("teacher.") and parameter.requires_grad), name
    for name, parameter in method.network.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) in encoder, name
    assert all(p.requires_grad for p in method.student.image_head.parameters())


@pytest.mark.parametrize("mask", [{"mask_probability": 0.0}, {"mask_probability": 1.0, "mask_ratio": [1.0, 1.0]}])
@pytest.mark.parametrize("kind", ["plain", "vit"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_no_and_all_patches_masked_one_and_two_samples(
    folder: Path, mask: dict[str, Any], kind: str, samples: int, centering: str
) -> None:
    method = build(DINO, replace(SMALL, centering=centering, **mask), kind=kind)
    result = method(views_of(folder, method, list(range(samples))))
    result["loss"].sum().backward()
    masks = mask["mask_probability"] > 0
    assert bool((result["patch"] > 0).all()) == masks
    assert bool((result["koleo"] != 0).any()) == (samples > 1)  # one vector has no neighbour
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            # every parameter takes part, or several GPUs would wait for each other
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_global_views_are_one_call_and_local_views_another(folder: Path) -> None:
    method = build(DINO, replace(SMALL, local_crops=5))
    calls: dict[str, list[int]] = {"student": [], "teacher": []}
    for who in calls:
        reader = getattr(method, who).reader
        reader.register_forward_hook(lambda _, inputs, __, who=who: calls[who].append(len(inputs[0])))
    method(views_of(folder, method, [0, 1, 2]))
    assert calls == {"teacher": [6], "student": [6, 15]}


@pytest.mark.parametrize("kind", ["plain", "vit"])
def test_the_student_does_not_see_masked_patches_and_the_teacher_does(folder: Path, kind: str) -> None:
    method = build(DINO, replace(SMALL, mask_probability=1.0, local_crops=0, mask_fill="mean"), kind=kind)
    views = views_of(folder, method, [0])
    edges = method.student.reader.patch
    place = int(views["masked_index"][0])
    number = views["masked"].shape[2]
    d, h, w = (int(i) for i in torch.unravel_index(torch.tensor(place % number), method.grid))
    box = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip((d, h, w), edges, strict=True))
    there: Any = (0, place // number, slice(None), *box)
    shown = views.get("masked_image", views["global"])
    if method.student.reader.masks_voxels:
        masked = shown[there]
        assert torch.allclose(masked, masked[:, :1, :1, :1].expand_as(masked))
        assert views["global"][there].std() > 0
    changed = {name: value.clone() for name, value in views.items()}
    changed["global"][there] += 1.0
    features = [
        method.student.reader.eval()(v.get("masked_image", v["global"]).flatten(0, 1), v["masked"].flatten(0, 1))[0]
        for v in (views, changed)
    ]
    assert torch.equal(*features)
    clean = [method.teacher.reader(v["global"].flatten(0, 1))[0] for v in (views, changed)]
    assert not torch.equal(*clean)


def test_the_teacher_follows_and_is_what_is_written(folder: Path) -> None:
    method = build(DINO, replace(SMALL, teacher_momentum=0.9), kind="pct_net")  # has running statistics
    method.train()
    assert not any(module.training for module in method.teacher.modules())
    method(views_of(folder, method, [0, 1]))
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 1
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    student = method.student.state_dict()
    method.after_step(0.0)
    for name, value in method.teacher.state_dict().items():
        if value.is_floating_point() and not torch.equal(before[name], student[name]):
            trained_name = dict(method.student.named_parameters()).get(name)
            moved = trained_name is None or trained_name.requires_grad
            expected = before[name] + 0.1 * moved * (student[name] - before[name])
            assert torch.allclose(value, expected, atol=1e-5), name
    still = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    method.after_step(1.0)  # at the end it stands still
    assert all(torch.equal(still[name], tensor) for name, tensor in method.teacher.state_dict().items())
    assert method.exported is method.teacher.reader.network
    assert list(method.exported.state_dict()) == list(method.network.state_dict())


def test_the_teachers_temperature_rises() -> None:
    method = build(DINO, replace(SMALL, teacher_temperature=[0.04, 0.07], temperature_warmup=0.5))
    for progress, temperature in ((0.0, 0.04), (0.25, 0.055), (0.5, 0.07), (0.9, 0.07)):
        method.before_step(progress)
        assert method.teacher_temperature.item() == pytest.approx(temperature)


def test_prototypes_are_frozen_by_their_learning_rate(folder: Path) -> None:
    method = build(DINO, replace(SMALL, freeze_prototypes=0.5, warmup=0.0, mask_probability=1.0))
    optimizer = build_optimizer(method.optimizer(), method.parameter_groups(), 1e-3)
    prototypes = [method.student.head(level).prototype_weight for level in ("image", "patch")]
    for step, moves in ((0, False), (4, False), (5, True)):
        set_rates(optimizer, method.optimizer(), 1e-3, step, 10)
        before = [weight.detach().clone() for weight in prototypes]
        optimizer.zero_grad()
        method(views_of(folder, method, [0, 1]))["loss"].sum().backward()
        optimizer.step()
        for old, weight in zip(before, prototypes, strict=True):
            assert weight.grad is not None
            assert weight.grad.any()  # Adam's averages are right when the rate rises
            assert torch.equal(old, weight) != moves
            # a first step of zero gradients would make it several times as long
            assert (weight - old).abs().max() < 1.5e-3


@pytest.mark.parametrize(
    ("batch", "centering", "temperature", "momentum", "koleo"),
    [
        (2, "sinkhorn", [0.02, 0.03], 0.996, 0.0),
        (63, "sinkhorn", [0.02, 0.03], 0.996, 0.0),
        (64, "sinkhorn", [0.02, 0.03], 0.996, 0.1),
        (255, "sinkhorn", [0.02, 0.03], 0.996, 0.1),
        (256, "sinkhorn", [0.04, 0.07], 0.992, 0.1),
    ],
)
def test_defaults_follow_the_batch_size(
    batch: int, centering: str, temperature: list[float], momentum: float, koleo: float
) -> None:
    method = build(DINO, SMALL)
    settings = replace(SMALL, koleo_weight=None)
    method.__init__(method.backbone, settings, replace(method.geometry, batch_size=batch))
    chosen = method.settings
    assert (chosen.centering, chosen.teacher_temperature) == (centering, temperature)
    assert (chosen.teacher_momentum, chosen.koleo_weight) == (momentum, koleo)
    assert method.optimizer().learning_rate == pytest.approx(0.002 * (batch / 1024) ** 0.5)
    named = replace(SMALL, koleo_weight=0.3, teacher_momentum=0.5, teacher_temperature=[0.1, 0.2], centering="sinkhorn")
    assert resolved(named, method.geometry) == named


@pytest.mark.parametrize(
    ("patch", "stride", "stages", "batch", "crop", "samples"),
    [
        ((128, 128, 128), (32, 32, 32), 6, 2, (64, 64, 64), 16),  # a third more voxels than the plan's
        ((48, 80, 96), (8, 16, 16), 5, 3, (24, 48, 48), 16),
        ((32, 48, 64), (8, 16, 16), 5, 2, (16, 32, 32), 10),
        ((16, 320, 320), (1, 64, 64), 7, 2, (8, 128, 128), 21),
        ((96, 96, 96), (16, 16, 16), 1, 2, (64, 64, 64), 6),  # four tokens along each axis
        ((64, 64, 64), (8, 8, 8), 4, 24, (64, 64, 64), 24),
    ],
)
def test_a_small_batch_becomes_a_larger_one_of_smaller_crops(
    patch: Triple, stride: Triple, stages: int, batch: int, crop: Triple, samples: int
) -> None:
    plan = DataGeometry(patch, (1.0, 1.0, 1.0), 1, ((1, 1, 1),) * (stages - 1) + (stride,), batch_size=batch)
    assert DINO.sampling(DINOSettings(), plan) == (crop, samples)
    before = view_voxels(DINOSettings(), plan) * batch
    after = view_voxels(DINOSettings(), replace(plan, crop_size=crop)) * samples
    assert 0.7 * before < after < 1.5 * before


def test_local_views_are_fewer_where_they_cannot_be_smaller() -> None:
    for size, expected in (((128, 128, 128), 8), ((96, 96, 96), 6), ((64, 64, 64), 2)):
        assert resolved(DINOSettings(), geometry(size, (32, 32, 32))).local_crops == expected


def test_rates_fall_towards_the_input_and_biases_do_not_decay() -> None:
    method = build(DINO, replace(SMALL, layer_decay=0.5, stem_lr_scale=0.2), kind="vit")
    found = {id(p): group for group in method.parameter_groups() for p in group.parameters}
    trainable = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    assert set(found) == {id(p) for p in trainable.values()}
    depth = len(method.network.backbone.blocks)
    encoder = method.network.backbone
    assert found[id(encoder.patch_embed.proj.weight)].lr_scale == pytest.approx(0.2 * 0.5 ** (depth + 1))
    assert found[id(encoder.pos_embed)].lr_scale == pytest.approx(0.5 ** (depth + 1))
    for level, block in enumerate(encoder.blocks):
        group = found[id(block.attn.qkv.weight)]
        assert (group.lr_scale, group.weight_decay_scale) == (pytest.approx(0.5 ** (depth - level)), 1.0)
        for undecayed in (block.attn.qkv.bias, block.norm1.weight):
            assert found[id(undecayed)].weight_decay_scale == 0.0
    assert found[id(method.student.image_head.prototype_weight)].lr_scale == 1.0


def geometry(size: tuple[int, int, int], stride: tuple[int, int, int]) -> DataGeometry:
    return DataGeometry(size, (1.0, 1.0, 1.0), 1, ((1, 1, 1), stride))


def test_local_views_are_half_as_large_and_legal() -> None:
    for size, stride, expected in (
        ((96, 96, 96), (16, 16, 16), (48, 48, 48)),
        ((128, 128, 128), (32, 32, 32), (64, 64, 64)),
        ((40, 56, 40), (8, 8, 8), (24, 32, 24)),
        ((40, 64, 64), (8, 16, 16), (24, 32, 32)),
        ((64, 64, 64), (32, 32, 32), (64, 64, 64)),  # a residual encoder takes none that is smaller
        ((16, 320, 320), (1, 64, 64), (8, 192, 192)),
    ):
        assert local_size(DINOSettings(), geometry(size, stride)) == expected
    fixed = replace(DINOSettings(), local_size=[32, 32, 32])
    assert local_size(fixed, geometry((96, 96, 96), (16, 16, 16))) == (32, 32, 32)
    with pytest.raises(UserError, match=r"local_size: expected multiples of \[24, 24, 24\].*got \[32, 32, 32\]"):
        local_size(fixed, geometry((96, 96, 96), (24, 24, 24)))


def test_a_sample_looks_the_same_in_any_batch(folder: Path) -> None:
    method = build(DINO, SMALL)
    together, alone = views_of(folder, method, [3, 4, 5]), views_of(folder, method, [4])
    for key in ("global", "local", "masked", "masked_image"):
        assert torch.equal(together[key][1], alone[key][0]), key
    own = together["sample"] == 1
    number = together["masked"].shape[2] * 2
    assert torch.equal(together["masked_index"][own] - number, alone["masked_index"])
    assert torch.equal(together["weight"][own], alone["weight"])


@pytest.mark.parametrize("kind", ["plain", "vit"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_and_can_be_trained(folder: Path, dtype: torch.dtype, centering: str, kind: str) -> None:
    method = build(DINO, replace(LEARNING, centering=centering), kind=kind)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    taken = 0
    for step in range(12):
        views: dict[str, Tensor] = views_of(folder, method, [2 * step, 2 * step + 1])
        state = {name: value.clone() for name, value in method.named_buffers()}
        exact = method(views)["loss"]
        for name, value in method.named_buffers():
            value.copy_(state[name])  # the call before moved the centers
        with torch.autocast("cpu", dtype):
            loss = method(views)["loss"]
        assert torch.allclose(loss, exact, rtol=0.05)
        optimizer.zero_grad()
        scaler.scale(loss.sum()).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() >= scale
    # the scaler starts too high and halves, a few times
    assert taken >= (8 if dtype == torch.float16 else 12)
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_intensity_views_differ_by_view() -> None:
    draws = []
    for place, (settings, exclusive) in enumerate(DINOSettings().intensity.of_views()):
        random = BatchRandom(place, VIEWS, range(400), CPU)
        steps = IntensityDraw.draw(settings, random, 1, (1.0, 1.0, 1.0), exclusive=exclusive).steps
        draws.append({kind.name: set(chosen.rows.tolist()) for kind, chosen in steps})
    for found in draws:
        curves = [found[name] for name in ("gamma", "noise", "histogram")]
        assert sum(map(len, curves)) == len(set.union(*curves))  # one of them at most
        assert 0.75 < sum(map(len, curves)) / 400 < 0.85
        assert all(len(rows) > 60 for rows in curves)
    first, second, local = draws
    assert first["blur"] ^ first["sharpen"] == set(range(400))
    assert "gibbs" not in first
    assert {"blur", "sharpen"}.isdisjoint(second)
    assert 0.15 < len(second["gibbs"]) / 400 < 0.25
    assert {"sharpen", "gibbs"}.isdisjoint(local)
    assert 0.4 < len(local["blur"]) / 400 < 0.6


def test_intensity_views_can_be_the_same_for_all() -> None:
    settings = DINOIntensitySettings(exclusive_probability=None, filters_by_view=False)
    assert settings.of_views() == [(settings, [])] * 3


def test_views_of_a_large_region_are_read_one_by_one(folder: Path) -> None:
    method = build(DINO, replace(SMALL, region=3.0))
    batch = batch_of(folder, method, [0, 1])
    assert len(batch.boxes) == 2 + 2
    views = method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU))
    assert views["global"].shape == (2, 2, 2, 16, 16, 16)
    assert views["local"].shape[:3] == (2, 2, 2)
    method(views)["loss"].sum().backward()
    alone = method.views(batch_of(folder, method, [1]), BatchRandom(0, VIEWS, [1], CPU))
    for key in ("global", "local"):
        assert torch.equal(views[key][1], alone[key][0])
