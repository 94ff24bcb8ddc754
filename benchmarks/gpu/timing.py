"""Time the device, the steps of every method, the compiler and the loader."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.context import UNFINISHED, Context, cpu_seconds, milliseconds
from benchmarks.gpu.correct import SMALL_DINO
from benchmarks.measure import once
from benchmarks.step import Run
from benchmarks.views import views_of
from benchmarks.workload import CONFIGURATION, start_trainer, write_dataset
from nnssl_ext.data.loader import PREFETCHED

GIB = 2**30
#: Methods whose compiled step is checked, on a plan that compiles in seconds.
COMPILED = ("dino", "volume_fusion", "masked_autoencoder")
#: 3DINO's crops as published: 2 of 96^3 and 8 of 48^3, from heads of 65,536 prototypes.
PUBLISHED_DINO = {"region": 100, "local_crops": 8, "local_size": [48, 48, 48]}
PUBLISHED_DINO |= {"hidden_dim": 2048, "bottleneck_dim": 256, "prototypes": 65536}


def ceilings(context: Context) -> None:
    """Measure what the device can do at most, and list what it is."""
    device, cuda = context.device, context.kind == "cuda"
    with context.row("machine") as row:
        row |= {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
        row["packages"] = {name: installed(name) for name in ("nnunetv2", "triton", "numpy", "blosc2", "timm")}
        if cuda:
            properties = torch.cuda.get_device_properties(device)
            row |= {"card": properties.name, "GiB": properties.total_memory / GIB, "CUDA": torch.version.cuda}
            row |= {"cuDNN": torch.backends.cudnn.version(), "multiprocessors": properties.multi_processor_count}
    source = target = None
    with context.row("copy") as row:
        source = torch.randn((2**20 if context.tiny else 2**30), device=device)
        target = torch.empty_like(source)
        spent = milliseconds(context, partial(target.copy_, source), 10)
        row["GB/s, read and written"] = 2 * source.numel() * 4 / spent / 1e6
    del source, target
    edge = 256 if context.tiny else 8192
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
    ):
        with context.row(f"matrix product, {name}") as row:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
            spent = milliseconds(context, partial(torch.matmul, a, b), 5)
            row["TFLOP/s"] = 2 * edge**3 / spent / 1e9
    edge = 16 if context.tiny else 64
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        with context.row(f"convolution, {str(layout).partition('.')[2]}") as row:
            image = torch.randn(2, 64, edge, edge, edge, device=device, dtype=torch.bfloat16)
            weight = torch.randn(64, 64, 3, 3, 3, device=device, dtype=torch.bfloat16)
            image, weight = image.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
            spent = milliseconds(context, partial(F.conv3d, image, weight, padding=1), 5)
            row["TFLOP/s"] = 2 * 2 * edge**3 * 64 * 64 * 27 / spent / 1e9


def installed(name: str) -> str:
    """Return a package's version; '' if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def compiling(context: Context) -> None:
    """Compile the step of three methods: seconds, recompilations, values and speed against eager."""
    os.environ["nnUNet_compile"] = "t"
    for name in (name for name in (("rotation",) if context.tiny else COMPILED) if not context.has(name)):
        with context.row(name, 3 if context.tiny else 15) as row:
            compile_step(context, name, row)


def compile_step(context: Context, name: str, row: dict[str, Any]) -> None:
    """Fill the row of one compiled method."""
    repeats = 4 if context.tiny else 50
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    folder = dataset(context.folder(name), "tiny" if context.tiny else "plain96")
    trainer = start_trainer(folder, name, context.device)
    if not trainer._do_i_compile():  # stock leaves CPUs out
        trainer.objective = torch.compile(trainer.method, backend="aot_eager")
    batches = iter(trainer.dataloader_train)

    def step() -> None:
        trainer.train_step(next(batches))

    row["first step, s"] = milliseconds(context, step, 1, warm_up=0) / 1000
    context.put(name, {**row, UNFINISHED: True})  # compiling may take all the time that is left
    milliseconds(context, step, 2, warm_up=0)
    graphs = counters["stats"]["unique_graphs"]
    row["compiled, ms"] = milliseconds(context, step, repeats, warm_up=0)
    row["graphs"], row["recompilations"] = graphs, counters["stats"]["unique_graphs"] - graphs
    row["graph breaks"] = sum(counters["graph_break"].values())
    row |= against_eager(context, trainer, next(batches))
    trainer.objective = trainer.method
    row["eager, ms"] = milliseconds(context, step, min(repeats, 10))
    trainer.dataloader_train = trainer.dataloader_val = None
    if row["objective, relative difference"] > 5e-2 or row["recompilations"]:
        row["failed"] = "Expected equal objectives and no recompilation after three steps."


def against_eager(context: Context, trainer: Any, batch: Any) -> dict[str, float]:
    """Return the relative difference of the compiled and the eager objective of one batch."""
    views = views_of(trainer.method, batch, context.device)
    losses = []
    for objective in (trainer.method, trainer.objective):
        torch.manual_seed(0)
        with torch.autocast(context.kind, trainer.amp_dtype or torch.bfloat16, enabled=bool(trainer.amp_dtype)):
            losses.append(float(objective(views)["loss"].float().mean()))
    return {"objective, relative difference": abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-9)}


def dataset(folder: Path, plan: str, **settings: Any) -> Path:
    """Write a data set for a step in the device's usual precision.

    Cases are those of the first data set of this plan: compressing large ones takes longer than the steps.
    """
    note = folder.parents[1] / f"{plan}.txt"  # parts are processes of their own
    data = write_dataset(folder, plan, settings, written=Path(note.read_text()) if note.is_file() else None)
    if not note.is_file():
        note.write_text(str(data))
    return data


def speed(context: Context) -> None:
    """Time a step of each method, with its shares, arithmetic and memory."""
    os.environ["nnUNet_compile"] = "f"
    rows = [row for row in timed(context) if not context.has(row[0])]
    folders = {title: dataset(context.folder(title), on, **settings) for title, _, on, settings in rows}
    for title, name, _, _ in rows:
        with context.row(title, 1 if context.tiny else 6) as row:
            time_step(context, name, folders[title], row)
    largest_vit(context)


def timed(context: Context) -> list[tuple[str, str, str, dict[str, Any]]]:
    """List the timed steps: title, method, plan, settings."""
    from nnssl_ext.methods import METHODS

    small = {"dino": SMALL_DINO} if context.tiny else {}
    rows = [(name, name, "tiny" if context.tiny else "residual128", small) for name in METHODS]
    rows.insert(1, ("volume_fusion on PCT-Net", "volume_fusion", "tiny_pct_net" if context.tiny else "pct_net", {}))
    return rows


def memory(context: Context) -> None:
    """Estimate the memory of the timed steps, beside what they allocated. It needs no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes, each of which would take memory on it
    rows = timed(context)
    folders = {title: dataset(context.folder(title), on, **settings) for title, _, on, settings in rows}
    file = context.output / "speed.json"
    measured = json.loads(file.read_text()) if file.is_file() else {}
    with multiprocessing.get_context("spawn").Pool(1 if context.tiny else 8) as pool:
        chosen = rows[:1] if context.tiny else rows
        estimates = {
            title: pool.apply_async(estimated, (name, str(folders[title]), context.kind))
            for title, name, _, _ in chosen
        }
        for title, waiting in estimates.items():
            with context.row(f"{title}, GiB") as row:
                try:
                    row["estimated"] = waiting.get(max(1.0, context.left - 1))
                except multiprocessing.TimeoutError:
                    row["left out"] = "The time was over."
                row["allocated"] = measured.get(title, {}).get("allocated, GiB")


def estimated(method: str, folder: str, kind: str) -> float:
    """Return the estimate of a step's allocated GiB, of the plans in a folder."""
    from nnssl_ext.methods import METHODS
    from nnssl_ext.training.memory.plan import needs_of

    plans, content = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    if kind == "cpu":
        plans["nnssl_ext"]["precision"] = "float32"
    (need,) = needs_of(plans, [CONFIGURATION], [METHODS[method]], content)
    return need.memory.allocated(need.batch) / GIB


def time_step(context: Context, name: str, folder: Path, row: dict[str, Any]) -> None:
    """Fill the row of one method: full step, bare network, shares, operations, memory, cores."""
    repeats = 1 if context.tiny else 5
    os.environ["nnUNet_n_proc_DA"] = "0" if context.tiny else "2"
    release(context)
    run = Run(folder, name, context.device)
    for _ in range(2):
        run.full()
    if context.kind == "cuda":  # the search for algorithms takes memory that a training does not keep
        row["allocated in the first steps, GiB"] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
    children = [process.pid for process in multiprocessing.active_children() if process.pid]
    before, begin = sum(map(cpu_seconds, children)), time.perf_counter()
    row["step, ms"] = milliseconds(context, run.full, repeats, warm_up=0)
    row["worker cores"] = (sum(map(cpu_seconds, children)) - before) / (time.perf_counter() - begin)
    in_a_row = mean_seconds(run.full, 2 * repeats, context.device)
    loading = seconds_per_batch(run.next, 2 if context.tiny else 2 * PREFETCHED)
    row["loader, ms a batch"] = 1000 * loading
    row["samples/s"] = run.trainer.batch_size / max(in_a_row, loading)
    if context.kind == "cuda":
        row["allocated, GiB"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved, GiB"] = torch.cuda.max_memory_reserved() / GIB
    patch = list(run.trainer.configuration_manager.patch_size)
    if run.image is not None and list(run.image.shape[2:]) == patch:
        row["bare, ms"] = milliseconds(context, run.bare, repeats, warm_up=1)
        row["full / bare"] = row["step, ms"] / row["bare, ms"]
    row["shares"] = run.shares(repeats)
    batch = run.next()
    with FlopCounterMode(display=False) as counter:
        run.trainer.train_step(batch)
    row["Tflop"] = counter.get_total_flops() / 1e12
    ceiling = ceiling_of(context)
    row["utilization"] = row["Tflop"] / (row["step, ms"] / 1000) / ceiling if ceiling else None
    run.trainer.dataloader_train = run.trainer.dataloader_val = None


def mean_seconds(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the mean time of a step in a row of them, as in a training.

    The device is not waited for in between. Batches come from those that the loader has ready.
    """

    def several() -> None:
        for _ in range(repeats):
            step()

    return once(several, device).wall / repeats


def seconds_per_batch(load: Callable[[], Any], ready: int) -> float:
    """Return the mean time in which the loader makes a batch, once those it has ``ready`` are taken."""
    for _ in range(ready):
        load()
    begin = time.perf_counter()
    for _ in range(ready):
        load()
    return (time.perf_counter() - begin) / ready


def release(context: Context) -> None:
    """Free what earlier trainers hold: they refer to themselves, so that only a collection finds them."""
    gc.collect()
    if context.kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ceiling_of(context: Context) -> float | None:
    """Return the TFLOP/s of the bfloat16 matrix product, if the ceilings were measured."""
    file = context.output / "ceilings.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    return rows.get("matrix product, bfloat16", {}).get("TFLOP/s")


def largest_vit(context: Context) -> None:
    """Time 3DINO on ViT-L at its published crops, doubling the samples until they do not fit."""
    settings: dict[str, Any] = {"dino": SMALL_DINO if context.tiny else PUBLISHED_DINO}
    if not context.tiny:  # a small batch would take smaller crops
        settings |= {"crop_size": [96, 96, 96], "batch_size": 2}
    trainer: Any = None
    if context.has("dino on a ViT, start"):  # it has spoilt the device
        return
    with context.row("dino on a ViT, start", 1 if context.tiny else 15):
        release(context)
        folder = dataset(context.folder("vit"), "tiny_vit" if context.tiny else "vit_large", **settings)
        trainer = start_trainer(folder, "dino", context.device)
    if trainer is None:
        return
    batches = iter(trainer.dataloader_train)
    read = [next(batches) for _ in range(1 if context.tiny else 8)]  # the same box twice would be sent once
    for number in [1, 2] if context.tiny else [1, 2, 4, 8, 16, 32]:
        with context.row(f"dino on a ViT, {number * trainer.batch_size} samples", 1 if context.tiny else 8) as row:
            batch = merged([read[n % len(read)] for n in range(number)])
            release(context)
            try:
                step = partial(trainer.train_step, batch)
                row["step, ms"] = milliseconds(context, step, 1 if context.tiny else 3, warm_up=1)
            except torch.OutOfMemoryError as error:
                row["does not fit"] = str(error).partition("\n")[0]
                break
            row["samples/s, without loading"] = 1000 * len(batch.indices) / row["step, ms"]
            if context.kind == "cuda":
                row["allocated, GiB"] = torch.cuda.max_memory_allocated() / GIB
    trainer.dataloader_train = trainer.dataloader_val = None


def merged(batches: list[Any]) -> Any:
    """Join batches to a larger one."""
    boxes = [[box for batch in batches for box in batch.boxes[place]] for place in range(len(batches[0].boxes))]
    return replace(batches[0], indices=[index for batch in batches for index in batch.indices], boxes=boxes)


def loader(context: Context) -> None:
    """Read crops with 1, 2 and 4 workers: crops a second and CPU seconds a crop."""
    from benchmarks import loader as benchmark
    from nnssl_ext.data.crops import Crop, CropDataset, CropRequest
    from nnssl_ext.data.index import CaseIndex

    edge, batches = (16, 4) if context.tiny else (128, 32)
    data = dataset(context.folder("data"), "tiny" if context.tiny else "residual128")
    index = CaseIndex.build(data / "nnUNetPlans_3d_fullres", workers=0, show_progress=False)
    crops = CropDataset(index, index.cases, CropRequest((Crop((edge,) * 3, benchmark.TURNED),)), seed=0)
    for workers in (1,) if context.tiny else (1, 2, 4):
        with context.row(f"{workers} workers", 1) as row:
            row["crops/s"], cpu = benchmark.with_workers(crops, workers, batches)
            row["CPU ms a crop"] = 1000 * cpu
    with context.row("this process") as row:
        row["resident, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
