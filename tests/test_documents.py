"""Documents say what is there."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from docs.settings_table import page_tables
from nnssl_ext import __version__
from nnssl_ext.cli import command_line
from nnssl_ext.cli.methods import settings_tables
from nnssl_ext.methods import METHODS, TRAINERS, Method
from nnssl_ext.recipe import available_recipes
from nnssl_ext.study.decathlon.tasks import tasks_table
from tests.conftest import REPOSITORY
from tests.documents import own_commands

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def test_every_setting_is_documented_with_its_default_and_source() -> None:
    text = (REPOSITORY / "docs" / "reference" / "settings.md").read_text()
    found = re.search(r"<!-- settings: begin -->\n(.*)\n<!-- settings: end -->", text, re.DOTALL)
    assert found
    assert found[1] == page_tables()
    shared = re.compile(r"^\w+(?=\.intensity\.)")
    names = re.findall(r"^\| `([\w.]+)` ", settings_tables(), re.MULTILINE)
    places = {name: {name, shared.sub("METHOD", name)} for name in names}
    assert [name for name, shown in places.items() if not any(f"`{place}`" in found[1] for place in shown)] == []


@pytest.mark.parametrize("method", METHODS.values())
def test_every_method_has_its_places(method: type[Method]) -> None:
    readme, overview = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/methods/index.md"))
    pages = "\n".join(path.read_text() for path in (REPOSITORY / "docs" / "methods").glob("*.md"))
    assert f"`{TRAINERS[method.name]}`" in readme
    assert f"`{TRAINERS[method.name]}`" in overview
    assert re.search(rf"^##? {method.title}$", pages, re.MULTILINE)
    assert list((REPOSITORY / "tests" / "methods").rglob(f"test_{method.name}.py"))
    assert method.name in available_recipes()


def test_every_recipe_is_in_the_settings() -> None:
    text = (REPOSITORY / "docs" / "reference" / "settings.md").read_text()
    assert [name for name in available_recipes() if f"`{name}`" not in text] == []


def test_the_readme_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.split()) <= 1000
    assert text.count("](docs/figures/") == 2


def test_the_readme_and_the_evidence_page_show_the_committed_claims() -> None:
    """Every difference in their tables is a row of claims.csv, and every row is in the evidence page."""
    with (REPOSITORY / "docs" / "evidence" / "claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    claims = [f"{float(row['mean']):+.1f} [{float(row['low']):+.1f}, {float(row['high']):+.1f}]" for row in rows]
    in_readme = sorted((int(row["readme"]), claim) for row, claim in zip(rows, claims, strict=True) if row["readme"])
    table = (REPOSITORY / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    assert re.findall(r"[+-]\d+\.\d \[.*?\]", table) == [claim for _, claim in in_readme]
    for document in ("README.md", "docs/evidence/index.md"):
        shown = re.findall(
            r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\](?=\*\*|\]|\s\|)", (REPOSITORY / document).read_text()
        )
        assert set(shown) <= {*claims, "+0.1 [-0.2, +0.5]"}, document
        assert len(shown) >= 15
    evidence = (REPOSITORY / "docs" / "evidence" / "index.md").read_text()
    assert [claim for claim in claims if claim not in evidence] == []


def test_the_site_names_every_page() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    assert sorted(page for page in pages if f": {page}\n" not in text) == []


def test_the_decathlons_tasks_are_documented() -> None:
    text = (REPOSITORY / "docs" / "how-to" / "decathlon.md").read_text()
    assert f"<!-- tasks: begin -->\n{tasks_table()}\n<!-- tasks: end -->" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_commands(document: Path) -> None:
    for line in own_commands(document):
        command_line().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    text = document.read_text()
    names = re.findall(r"`((?:tests|benchmarks|nnssl_ext|plans|requirements|docs)/[\w./-]+)`", text)
    names += [f"tests/{name}" for name in re.findall(r"`((?!tests/)(?:\w+/)*test_\w+\.py)`", text)]
    named = [name for name in names if not re.search(r"[A-Z]{4}|(?i:denoising)", name)]  # examples
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_citation_names_this_version() -> None:
    assert f"version: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
