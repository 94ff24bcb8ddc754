"""Documents say what is there."""

import re
from pathlib import Path

import pytest

from nnssl_ext import __version__
from nnssl_ext.cli.methods import settings_tables
from nnssl_ext.methods import METHODS, Method
from nnssl_ext.recipe import available_recipes
from tests.conftest import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


def test_every_setting_is_documented_with_its_default_and_source() -> None:
    text = (REPOSITORY / "docs" / "plans.md").read_text()
    found = re.search(r"<!-- settings: begin -->\n(.*)\n<!-- settings: end -->", text, re.DOTALL)
    assert found
    assert found[1] == settings_tables()


@pytest.mark.parametrize("method", METHODS.values())
def test_every_method_has_its_places(method: type[Method]) -> None:
    readme, methods = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/methods.md"))
    assert f"`{method.trainer}`" in readme
    assert f"`{method.trainer}`" in methods
    assert f"## {method.title}" in methods
    assert (REPOSITORY / "tests" / "methods" / f"test_{method.name}.py").is_file()
    assert method.name in available_recipes()


def test_every_recipe_is_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [name for name in available_recipes() if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == []


def test_the_citation_names_this_version() -> None:
    assert f"version: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
