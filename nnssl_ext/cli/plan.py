"""Derive pretraining plans from a data set's own plans.

    nnssl_ext plan -d 4 -c 3d_fullres -o nnUNetPlans_vf volume_fusion epochs=200 volume_fusion.levels=4
    nnssl_ext plan --rename-settings PLANS.json

Recipes (names in plans/ or JSON files) and settings are merged into the plans in their order. The result shares the
preprocessed data; nnUNetv2_train takes it with -p nnUNetPlans_vf. The memory of a training step on a GPU is estimated
and printed. With --gpu-memory-target, the largest batch that fits is set.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnssl_ext.commands import RunName
from nnssl_ext.configurations import configurations_3d
from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.settings import PLANS_KEY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(wrong_usage=parser.error)
    parser.add_argument("-d", metavar="DATASET", help="dataset name or ID")
    parser.add_argument(
        "-c",
        nargs="+",
        default=None,
        metavar="CONFIGURATION",
        help="configurations whose batch, patch and network a recipe changes (all 3-D ones)",
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (nnUNetPlans)")
    parser.add_argument("-o", metavar="NAME", help="name of the new plans")
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="methods whose memory is estimated (those whose settings are given, else volume_fusion)",
    )
    parser.add_argument(
        "--gpu-memory-target",
        type=float,
        metavar="GB",
        help="set the largest batch that fits this memory; a recipe's own batch is only lowered",
    )
    parser.add_argument(
        "--rename-settings",
        nargs="+",
        metavar="FILE",
        help="only give settings of version 0.1 their new names in these plans or recipes",
    )
    parser.add_argument(
        "--like-source",
        metavar="SOURCE",
        help="take spacing, normalization and patch from pretrained weights; the data must be preprocessed again",
    )
    parser.add_argument("overlays", nargs="*", metavar="RECIPE|SETTING=VALUE", help="merged in their order")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.methods import METHODS, SCHEMAS
    from nnssl_ext.recipe import derive_plans, read_json, recipes_of, write_json
    from nnssl_ext.settings import split_sections
    from nnssl_ext.training.checks import check_plans

    if arguments.rename_settings:
        _rename_settings(arguments.rename_settings)
        return
    if not arguments.d or not arguments.o:
        arguments.wrong_usage("the following arguments are required: -d, -o")
    folder = dataset_folder(arguments.d)
    plans = read_json(folder / f"{arguments.p}.json")
    target = folder / f"{arguments.o}.json"
    _check_name(arguments.o, arguments.p, target)
    configurations = _configurations(plans, arguments.c, arguments.p)

    alike: list[str] = []
    if arguments.like_source:
        from nnssl_ext.transfer.differences import plans_like
        from nnssl_ext.transfer.read import read_source

        geometry = read_source(arguments.like_source).geometry
        plans, alike = plans_like(plans, geometry, arguments.o, configurations)
    recipes = recipes_of(arguments.overlays)
    for recipe in recipes:  # names the recipe that is wrong, which the merged plans cannot
        split_sections(recipe.settings, SCHEMAS, recipe.name)
    derived = derive_plans(plans, arguments.o, recipes, configurations)
    dataset_json = read_json(folder / "dataset.json")
    for configuration in configurations:
        for method in METHODS.values():
            check_plans(method, derived, configuration, dataset_json)
    lines = _plan_memory(arguments, derived, configurations, dataset_json)
    before = read_json(target) if target.is_file() else derived
    if before != json.loads(json.dumps(derived)):
        print(f"note: {target} held other plans. Runs of these can go on only with the plans.json of their results")
    write_json(derived, target)
    print(f"wrote {target}\n" + "\n".join(lines))
    if alike:
        words = ["nnUNetv2_preprocess", "-d", arguments.d, "-plans_name", arguments.o, "-c", *configurations]
        print("\n".join(alike) + f"\npreprocess the data again: {shlex.join(words)}")
    shown = "3d_fullres" if "3d_fullres" in configurations else configurations[0]
    command = RunName(folder.name, shown, "FOLD", arguments.o).command()
    print(f"use it with: {command} -tr ...")


def _rename_settings(files: Sequence[str]) -> None:
    """Rewrite settings that have names of version 0.1."""
    from nnssl_ext.recipe import read_json, write_json
    from nnssl_ext.renamed import rename_settings

    for file in map(Path, files):
        content = read_json(file)
        if not isinstance(content.get(PLANS_KEY), dict):
            raise UserError(f"{file} has no '{PLANS_KEY}' settings. Give plans or a recipe of nnssl_ext")
        settings, changed = rename_settings(content[PLANS_KEY])
        if changed:
            write_json({**content, PLANS_KEY: settings}, file)
        print(f"{file}: {', '.join(f'{old} -> {new}' for old, new in changed.items()) or 'no old names'}")


def _plan_memory(arguments: argparse.Namespace, plans: dict, configurations: list[str], dataset: dict) -> list[str]:
    """Set the batch for a target, and describe the memory."""
    from nnssl_ext.training.memory.estimate import GIB
    from nnssl_ext.training.memory.plan import fitting_batch, needs_of, wanted_methods

    target = arguments.gpu_memory_target
    if target is not None and not 0 < target < math.inf:
        raise UserError(f"--gpu-memory-target must be a positive number of GB, got {target}")
    methods = wanted_methods(arguments.method, plans)
    settings = plans.setdefault(PLANS_KEY, {})
    named = settings.get("batch_size")
    if target is not None:
        # a batch that is set keeps the plans' patch, also for methods that would choose smaller crops
        settings["batch_size"] = named or plans["configurations"][configurations[0]]["batch_size"]
    try:
        needs = needs_of(plans, configurations, methods, dataset)
    except (Exception, UserError) as error:
        if target is not None or arguments.method:
            raise
        # nobody asked for an estimate
        return [f"memory on a GPU is not estimated: {getattr(error, 'line', f'{type(error).__name__}: {error}')}"]
    lines = ["memory on a GPU, estimated (docs/how-to/gpu-memory.md):"]
    if target is not None:
        settings["batch_size"] = fits = fitting_batch(needs, target * GIB, named, plans, dataset)
        needs = [replace(need, batch=fits) for need in needs]
        note = "as named, fits" if fits == named else "is the largest that fits"
        lines = [f"batch_size {fits} {note}" + (f"; {named} was named" if named not in (None, fits) else ""), *lines]
    return [*lines, *(f"  {need.line(None if target is None else target * GIB)}" for need in needs)]


def _check_name(name: str, source: str, target: Path) -> None:
    from nnssl_ext.recipe import read_json

    if "__" in name or Path(name).name != name or name.startswith("."):
        raise UserError(f"plans name '{name}' cannot be used: no '__' (nnU-Net splits folder names there), no path")
    if name == source:
        raise UserError(f"-o {name} would overwrite the plans it starts from. Give another name")
    if target.exists() and PLANS_KEY not in read_json(target):
        raise UserError(f"{target} exists and was not made by nnssl_ext plan. Give another name with -o")


def _configurations(plans: dict, wanted: list[str] | None, name: str) -> list[str]:
    found = list(configurations_3d(plans))
    if not found:
        raise UserError(f"plans {name} have no 3-D configuration. Pretraining is 3-D")
    for configuration in wanted or ():
        if configuration not in found:
            raise UserError(f"plans {name} have no 3-D configuration '{configuration}'. They have {', '.join(found)}")
    return wanted or found
