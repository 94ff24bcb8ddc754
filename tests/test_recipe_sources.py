"""Recipes of publications against the table of their sources, and templates against the defaults."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from docs.default_recipes import default_recipe
from nnssl_ext.methods import METHODS
from nnssl_ext.recipe import available_recipes, load_recipe
from tests.conftest import REPOSITORY

TABLE = REPOSITORY / "docs" / "reference" / "published_settings.md"


def sources(recipe: str) -> dict[str, tuple[Any, str]]:
    """Read a recipe's rows of the table: setting -> value and source."""
    section = re.search(rf"^## `{re.escape(recipe)}`\n(.*?)(?=^## |\Z)", TABLE.read_text(), re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.+?) \|$", section[1], re.MULTILINE)
    assert len({setting for setting, _, _ in rows}) == len(rows), "a setting stands twice"
    return {setting: (json.loads(value), source) for setting, value, source in rows}


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List the settings of nested sections by their dotted names."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


#: Recipes that claim a publication.
PUBLISHED = sorted(set(re.findall(r"^## `(\w+)`$", TABLE.read_text(), re.MULTILINE)))


def test_every_recipe_of_a_paper_has_its_table() -> None:
    claimed = {name for name in available_recipes() if "paper" in name}
    assert claimed <= set(PUBLISHED) <= set(available_recipes())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_each_setting_of_a_paper_is_traced_to_its_source(recipe: str) -> None:
    content = load_recipe(recipe)
    found = dict(leaves({**content.settings, "configuration": content.configuration}))
    found |= dict(leaves({"architecture": content.architecture}))
    table = sources(recipe)
    assert {name: value for name, (value, _) in table.items()} == found
    assert all(len(source) > 3 for _, source in table.values())


@pytest.mark.parametrize("name", METHODS)
def test_templates_equal_the_defaults(name: str) -> None:
    assert (REPOSITORY / "plans" / f"{name}.json").read_text() == default_recipe(METHODS[name])
