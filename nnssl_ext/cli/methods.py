"""List the pretraining methods, their trainers and the recipes.

With --settings: every setting with its default and source, as the tables of docs/reference/settings.md.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", action="store_true", help="print the tables of all settings (Markdown)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.settings:
        print(settings_tables())
        return
    from nnssl_ext.catalog import catalog
    from nnssl_ext.recipe import available_recipes

    for entry in catalog():
        print(f"{entry.title}\n  -tr {entry.trainer}\n  settings: {entry.name}.*\n  {entry.citation}")
    print(f"recipes: {', '.join(available_recipes())}")


def settings_tables() -> str:
    """Return Markdown tables of all settings."""
    from nnssl_ext.methods import METHODS  # imports torch
    from nnssl_ext.settings import CommonSettings, FinetuneSettings, settings_table

    head = ["| setting | type | default | what it is | source |", "|---|---|---|---|---|"]
    parts = ["### Common settings", "", *head, *settings_table(CommonSettings)]
    for method in METHODS.values():
        parts += ["", f"### {method.title}", "", *head, *settings_table(method.Settings, f"{method.name}.")]
    parts += ["", "### Fine-tuning", "", *head, *settings_table(FinetuneSettings, "finetune.")]
    return "\n".join(parts)
