"""Derive pretraining plans from a data set's own plans.

    nnssl_ext plan -d 4 -c 3d_fullres -o nnUNetPlans_vf volume_fusion epochs=200 volume_fusion.levels=4

Recipes (names in plans/ or JSON files) and settings are laid over the plans in their order. The result shares the
preprocessed data and is used by nnUNetv2_train ... -p nnUNetPlans_vf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.environment import dataset_folder
from nnssl_ext.errors import UserError
from nnssl_ext.settings import PLANS_KEY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    parser.add_argument(
        "-c",
        nargs="+",
        default=None,
        metavar="CONFIGURATION",
        help="configurations whose batch, patch and network a recipe changes; default: all 3-D ones",
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (nnUNetPlans)")
    parser.add_argument("-o", required=True, metavar="NAME", help="name of the new plans")
    parser.add_argument("overlays", nargs="*", metavar="RECIPE|SETTING=VALUE", help="what to lay over, in order")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.methods import METHODS, SCHEMAS
    from nnssl_ext.recipe import Recipe, assignments_recipe, derive_plans, load_recipe, read_json, write_json
    from nnssl_ext.settings import split_sections
    from nnssl_ext.training.preflight import check_plans

    folder = dataset_folder(arguments.d)
    plans = read_json(folder / f"{arguments.p}.json")
    target = folder / f"{arguments.o}.json"
    _check_name(arguments.o, arguments.p, target)
    configurations = _configurations(plans, arguments.c, arguments.p)

    recipes: list[Recipe] = [
        assignments_recipe([word]) if "=" in word else load_recipe(word) for word in arguments.overlays
    ]
    for recipe in recipes:  # names the recipe that is wrong, which the merged plans cannot
        split_sections(recipe.settings, SCHEMAS, recipe.name)
    derived = derive_plans(plans, arguments.o, recipes, configurations)
    dataset_json = read_json(folder / "dataset.json")
    for configuration in configurations:
        for method in METHODS.values():
            check_plans(method, derived, configuration, dataset_json)
    write_json(derived, target)
    print(
        f"wrote {target}\nuse it with: nnUNetv2_train {arguments.d} {configurations[0]} FOLD -p {arguments.o} -tr ..."
    )


def _check_name(name: str, source: str, target: Path) -> None:
    from nnssl_ext.recipe import read_json

    if "__" in name or Path(name).name != name or name.startswith("."):
        raise UserError(f"plans name '{name}' cannot be used: no '__' (nnU-Net splits folder names there), no path")
    if name == source:
        raise UserError(f"-o {name} would overwrite the plans it starts from; give another name")
    if target.exists() and PLANS_KEY not in read_json(target):
        raise UserError(f"{target} exists and was not made by nnssl_ext plan; give another name with -o")


def _configurations(plans: dict, wanted: list[str] | None, name: str) -> list[str]:
    own = [
        key
        for key, value in plans["configurations"].items()
        if "architecture" in value and len(value.get("patch_size", ())) == 3
    ]
    if not own:
        raise UserError(f"plans {name} have no 3-D configuration; pretraining is 3-D")
    for configuration in wanted or ():
        if configuration not in own:
            raise UserError(f"plans {name} have no 3-D configuration '{configuration}'; they have {', '.join(own)}")
    return wanted or own
