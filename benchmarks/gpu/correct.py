"""Compare every method on the GPU with the CPU: views, objective, gradients, precision, host waits."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.views import views_of
from benchmarks.workload import start_trainer, write_dataset

SMALL_DINO = {"local_crops": 2, "hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 128}
#: Relative norms up to which values count as equal.
FLOAT32, HALF, VIEWS = 1e-3, 5e-2, 1e-3
#: Share of whole numbers that may differ: voxels at a threshold fall on either side.
FLIPPED = 1e-4


def correct(context: Context) -> None:
    """Check each method on one batch with the same weights."""
    from nnssl_ext.methods import METHODS

    os.environ["nnUNet_compile"] = "f"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in (name for name in METHODS if not context.has(name)):
        with context.row(name, 2) as row:
            check(context, name, row)


def check(context: Context, name: str, row: dict[str, Any]) -> None:
    """Fill the row of one method."""
    settings = {"precision": "float32", "dino": SMALL_DINO}
    data = write_dataset(context.folder(name), "tiny" if context.tiny else "counted", settings)
    cpu = torch.device("cpu")
    trainer = start_trainer(data, name, cpu)
    batch = next(iter(trainer.dataloader_train))
    here, there = trainer.method, copy.deepcopy(trainer.method).to(context.device)
    views = views_of(here, batch, cpu)
    with host_noise():
        drawn, expected = views_of(there, batch, context.device), views_of(here, batch, cpu)
    got = {key: value.cpu() for key, value in drawn.items()}
    row["views"] = {key: view_difference(got[key], expected[key]) for key in expected}
    limits = {key: VIEWS if view.is_floating_point() else FLIPPED for key, view in expected.items()}
    row["views are equal"] = all(value <= limits[key] for key, value in row["views"].items())
    loss, gradient = step(here, views, None)
    moved = {key: value.to(context.device) for key, value in views.items()}
    for kind, dtype in {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        other, other_gradient = step(there, moved, dtype)
        limit = FLOAT32 if dtype is None else HALF
        row[kind] = {
            "loss": relative(other, loss),
            "gradient": relative(other_gradient, gradient),
            "finite": bool(torch.isfinite(other).all() and torch.isfinite(other_gradient).all()),
        }
        close = row[kind]["loss"] <= limit and (dtype is not None or row[kind]["gradient"] <= limit)
        judged = dtype is not torch.float16 or context.kind == "cuda"  # trainers refuse float16 on CPUs
        row[kind]["right"] = bool(close and row[kind]["finite"]) or not judged
    trainer.dataloader_train = trainer.dataloader_val = None
    row["host waits"] = host_waits(context, data, name)
    wrong = [kind for kind in ("float32", "bfloat16", "float16") if not row[kind]["right"]]
    wrong += [] if row["views are equal"] else ["views"]
    if wrong:
        row["failed"] = f"Expected equal values, got differences in {', '.join(wrong)}."


@contextmanager
def host_noise() -> Iterator[None]:
    """Draw per-voxel noise on the CPU by the definitions, so that a GPU gets the same values."""
    from nnssl_ext.views import appearance
    from nnssl_ext.views.random import BatchRandom

    generator, functions, normal_ = torch.Generator, {"randn": torch.randn, "rand": torch.rand}, Tensor.normal_

    def on_host(name: str, *shape: Any, device: Any = None, **options: Any) -> Tensor:
        return functions[name](*shape, **options).to(device)

    def normal_on_host(noise: Tensor, **options: Any) -> Tensor:
        return noise.copy_(normal_(torch.empty(noise.shape), **options))

    with (
        patch.object(torch, "Generator", lambda *_: generator()),
        patch.object(torch, "randn", partial(on_host, "randn")),
        patch.object(torch, "rand", partial(on_host, "rand")),
        patch.object(Tensor, "normal_", normal_on_host),
        patch.object(BatchRandom, "bits", BatchRandom.noise),
        patch.object(appearance, "has_kernels", lambda *_: False),
    ):
        yield


def step(method: Any, views: dict[str, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return the objective and all gradients of one forward and backward pass, on the CPU."""
    method.zero_grad(set_to_none=True)
    method.train()
    torch.manual_seed(0)
    device = next(method.parameters()).device
    scale = 128.0 if dtype is torch.float16 else 1.0
    with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
        loss = method(views)["loss"].float().mean()
    (scale * loss).backward()
    gradients = [p.grad.float().flatten() / scale for p in method.parameters() if p.grad is not None]
    return loss.detach().cpu().double()[None], torch.cat(gradients).cpu().double()


def view_difference(view: Tensor, reference: Tensor) -> float:
    """Return the relative norm of a difference, of whole numbers the share that differs."""
    if reference.is_floating_point():
        return relative(view.double(), reference.double())
    return float((view != reference).double().mean())


def relative(value: Tensor, reference: Tensor) -> float:
    """Return the norm of a difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))


def host_waits(context: Context, data: Any, name: str) -> dict[str, int]:
    """Count by source line where a training step on the device makes the host wait."""
    trainer = start_trainer(data, name, context.device, "again")
    if context.kind == "cuda":
        trainer.amp_dtype = torch.bfloat16  # as trainings have it
    batches = iter(trainer.dataloader_train)
    trainer.train_step(next(batches))
    batch = next(batches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if context.kind == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step(batch)
        finally:
            if context.kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    trainer.dataloader_train = trainer.dataloader_val = None
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))
    return dict(lines.most_common())
