"""Whether 3DINO learns: gradients of its terms, information of its targets, accuracy on masked patches.

    python -m benchmarks dino_learning -o FILE.csv [--seed 1] [--shuffled] [SETTING=VALUE ...]

Trains on the first four fifths of a preprocessed data set and validates on the rest, on one CPU thread in bfloat16,
with recipe ``cpu_small``. Every ``--every`` steps it writes a row: gradient norms of each weighted term on the encoder
and on its deepest stage, information of the targets in nats, accuracy on masked patches and retrieval of the other
view. With ``--shuffled`` the voxels of all that is read of a case are permuted first: what is learned then is no
anatomy.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from benchmarks.learning import shuffle_voxels
from nnssl_ext.data.crops import CropDataset, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.recipe import assignments_recipe, derive_plans, load_recipe, read_json
from nnssl_ext.training.checks import check_plans, target_backbone
from nnssl_ext.training.onednn import avoid_two_slice_bug
from nnssl_ext.training.optimization import build_optimizer, clip_gradients, set_rates
from nnssl_ext.training.wrapping import set_memory_format
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom, step_seed

CPU = torch.device("cpu")
#: Validation batches of four samples.
VALIDATION_BATCHES = 16


@dataclass
class Run:
    """A training of 3DINO without its trainer."""

    method: Any
    data: dict[int, CropDataset]
    batch: int
    rate: float
    seed: int

    def views(self, first: int, number: int, stream: int) -> dict[str, Tensor]:
        indices = list(range(first, first + number))
        with torch.no_grad():
            batch = collate([self.data[stream][index] for index in indices])
            views: dict[str, Tensor] = self.method.views(batch, BatchRandom(self.seed, stream + VIEWS, indices, CPU))
        return views

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            terms: dict[str, Tensor] = self.method(views)
        return terms

    def gradient_norms(self, views: dict[str, Tensor]) -> dict[str, float]:
        """Compute the gradient norm of each weighted term; the terms' gradients add up."""
        method, settings = self.method, self.method.settings
        buffers = {name: value.clone() for name, value in method.named_buffers()}
        stages = [[p for p in layer if p.requires_grad] for layer in method.backbone.layers()]
        parameters = [parameter for stage in stages for parameter in stage]

        def gradient(patch: float, koleo: float) -> Tensor:
            method.settings = replace(settings, patch_weight=patch, koleo_weight=koleo)
            loss = self.loss(views)["loss"].mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for name, value in method.named_buffers():
                value.copy_(buffers[name])  # the forward pass moves the centers
            return torch.cat([g.flatten() for g in gradients])

        image = gradient(0.0, 0.0)
        found = {
            "image": image,
            "patch": gradient(settings.patch_weight, 0.0) - image,
            "koleo": gradient(0.0, settings.koleo_weight) - image,
        }
        method.settings = settings
        deepest = sum(p.numel() for p in stages[-1])
        return {f"gradient_{name}": g.norm().item() for name, g in found.items()} | {
            f"gradient_{name}_deepest": g[-deepest:].norm().item() for name, g in found.items()
        }

    def validate(self) -> dict[str, float]:
        self.method.eval()
        with torch.no_grad():
            for number in range(VALIDATION_BATCHES):
                self.loss(self.views(4 * number, 4, VALIDATION))
        measures: dict[str, float] = self.method.check_validation({}).measures
        self.method.train()
        kept = (
            "image_information",
            "patch_information",
            "masked_patches",
            "view_retrieval",
            "effective_rank",
            "chance",
        )
        return {name: measures[name] for name in kept}


def prepare(dataset: str, words: list[str], seed: int, shuffled: bool) -> Run:
    """Build the method and its data from a preprocessed data set."""
    base = Path(os.environ["nnUNet_preprocessed"]) / dataset
    recipes = [load_recipe("cpu_small"), assignments_recipe(words)]
    plans = derive_plans(read_json(base / "nnUNetPlans.json"), "nnUNetPlans", recipes, ["3d_fullres"])
    common, settings, geometry, batch = check_plans(DINO, plans, "3d_fullres", read_json(base / "dataset.json"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    index = CaseIndex.build(base / configuration.data_identifier)
    geometry = replace(geometry, case_size=index.common_size())
    torch.manual_seed(seed)
    method = DINO(target_backbone(manager, configuration, geometry.channels, 2), settings, geometry)
    avoid_two_slice_bug(method, CPU, torch.bfloat16)
    set_memory_format(method, "auto", CPU, torch.bfloat16)
    if shuffled:
        shuffle_voxels(method, "before")
    cut, request = int(0.8 * len(index.cases)), DINO.crops(settings, geometry)
    cases = {0: index.cases[:cut], VALIDATION: index.cases[cut:]}
    data = {stream: CropDataset(index, own, request, seed, stream) for stream, own in cases.items()}
    rate = method.optimizer().learning_rate if common.learning_rate is None else common.learning_rate
    print(f"crop {geometry.crop_size}, batch {batch}, learning rate {rate:.2g}", flush=True)
    return Run(method, data, batch, rate, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings such as dino.prototypes=1024")
    parser.add_argument("-d", default="Dataset802_LeftAtrium", help="preprocessed data set")
    parser.add_argument("-o", required=True, help="CSV file to write")
    parser.add_argument("--name", default="", help="name of the rows")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="permute voxels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = prepare(arguments.d, arguments.settings, arguments.seed, arguments.shuffled)
    method, recipe, steps = run.method, run.method.optimizer(), arguments.steps
    optimizer = build_optimizer(recipe, method.parameter_groups(), run.rate)
    clipped = [list(module.parameters()) for module in method.clipped_modules()]
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    method.train()
    for step in range(steps + 1):
        if step % arguments.every == 0:
            method.before_step(min(step / steps, 0.999))
            row = {"name": arguments.name, "seed": run.seed, "shuffled": arguments.shuffled, "step": step}
            row |= run.gradient_norms(run.views(step * run.batch, run.batch, 0)) | run.validate()
            rows.append(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | {"cpu_s": int(seconds)}
            )
            with Path(arguments.o).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(rows[-1], flush=True)
        if step == steps:
            break
        begin = time.process_time()
        set_rates(optimizer, recipe, run.rate, step, steps)
        method.before_step(step / steps)
        torch.manual_seed(step_seed(run.seed, step))
        optimizer.zero_grad(set_to_none=True)
        run.loss(run.views(step * run.batch, run.batch, 0))["loss"].mean().backward()
        clip_gradients(clipped, recipe.max_grad_norm)
        optimizer.step()
        method.after_step((step + 1) / steps)
        seconds += time.process_time() - begin


if __name__ == "__main__":
    main()
