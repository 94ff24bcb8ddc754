"""Estimate a study's cost from a few timed steps."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.errors import UserError
from nnssl_ext.networks.target import planned_network
from nnssl_ext.recipe import read_json
from nnssl_ext.settings import CommonSettings
from nnssl_ext.study.grid import PRETRAINING, Grid
from nnssl_ext.training.wrapping import mixed_precision

#: Steps before the clock starts, and on it.
WARM_UP, TIMED = 1, 2


def estimate(grid: Grid) -> tuple[float, str]:
    """Estimate the cost of a prepared grid's unfinished runs, in hours and in words.

    A step is that of the network alone, on one device. Reading, augmentation and prediction come on top.
    """
    runs, steps = 0, 0
    for run in grid.all_runs():
        if grid.done(run):
            continue
        runs += 1
        steps += grid.pretraining_steps() if run.kind == PRETRAINING else grid.last_step(run)
    dataset_json = read_json(grid.preprocessed / "dataset.json")
    seconds = seconds_per_step(grid.plans, grid.protocol.configuration, dataset_json, grid.common, grid.device)
    hours = steps * seconds / 3600
    text = f"{runs} runs, {steps:,} steps at {seconds:.3g} s: about {hours:.2g} h on one device"
    return hours, f"{text}, without reading and prediction"


def seconds_per_step(plans: dict, configuration: str, dataset_json: dict, common: CommonSettings, device: str) -> float:
    """Time a step of the plan's network on noise.

    Raises:
        UserError: If the step does not fit the GPU.
    """
    words = plans, configuration, dataset_json, common, torch.device(device)
    if device == "cpu":
        return _time_step(*words)
    # in a process of its own, which gives the GPU's memory back before the runs want it
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_time_step, *words).result()
        except (torch.OutOfMemoryError, BrokenProcessPool) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{plans['dataset_name']}: a step of this network could not be timed on the GPU ({reason}). "
                f"Give a smaller configuration.batch_size or configuration.patch_limit to the study"
            ) from error


def _time_step(
    plans: dict, configuration: str, dataset_json: dict, common: CommonSettings, device: torch.device
) -> float:
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, config, dataset_json)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train sets it
    network = planned_network(manager, configuration, dataset_json).to(device)
    batch = torch.randn(config.batch_size, channels, *config.patch_size, device=device)
    dtype = mixed_precision(device, common.precision)
    begin = 0.0
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            begin = _now(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = network(batch)
        sum(level.float().square().mean() for level in output).backward()
    return (_now(device) - begin) / TIMED


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
