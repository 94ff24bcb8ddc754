"""List the pretraining methods, their trainers and the recipes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.methods import METHODS  # torch takes seconds to import
    from nnssl_ext.recipe import available_recipes

    for method in METHODS.values():
        print(f"{method.title}\n  -tr {method.trainer}\n  settings: {method.name}.*\n  {method.citation}")
    print(f"recipes: {', '.join(available_recipes())}")
