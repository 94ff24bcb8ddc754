"""Documents say what is there."""

import re
import shlex
from pathlib import Path

import pytest

from nnssl_ext import __version__
from nnssl_ext.cli import command_line
from nnssl_ext.cli.methods import settings_tables
from nnssl_ext.methods import METHODS, TRAINERS, Method
from nnssl_ext.recipe import available_recipes
from nnssl_ext.study.decathlon.tasks import tasks_table
from tests.conftest import REPOSITORY
from tests.documents import own_commands

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


def test_every_setting_is_documented_with_its_default_and_source() -> None:
    text = (REPOSITORY / "docs" / "plans.md").read_text()
    found = re.search(r"<!-- settings: begin -->\n(.*)\n<!-- settings: end -->", text, re.DOTALL)
    assert found
    assert found[1] == settings_tables()


@pytest.mark.parametrize("method", METHODS.values())
def test_every_method_has_its_places(method: type[Method]) -> None:
    readme, methods = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/methods.md"))
    assert f"`{TRAINERS[method.name]}`" in readme
    assert f"`{TRAINERS[method.name]}`" in methods
    assert f"## {method.title}" in methods
    assert (REPOSITORY / "tests" / "methods" / f"test_{method.name}.py").is_file()
    assert method.name in available_recipes()


def test_every_recipe_is_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [name for name in available_recipes() if f"`{name}`" not in readme] == []


def test_the_decathlons_tasks_are_documented() -> None:
    text = (REPOSITORY / "docs" / "decathlon.md").read_text()
    assert f"<!-- tasks: begin -->\n{tasks_table()}\n<!-- tasks: end -->" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_commands(document: Path) -> None:
    for line in own_commands(document):
        command_line().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == []


def test_the_citation_names_this_version() -> None:
    assert f"version: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
