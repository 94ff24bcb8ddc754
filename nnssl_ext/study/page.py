"""The result page: one HTML file with everything in it, and the same in Markdown."""

from __future__ import annotations

import base64
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from nnssl_ext.files import replaced_on_success


@dataclass
class Table:
    """A table; ``total`` sets its last row in bold."""

    head: list[str]
    rows: list[list[str]]
    total: bool = False


@dataclass
class Section:
    """A part of the page; everything is escaped when it is written."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    table: Table | None = None
    images: list[bytes] = field(default_factory=list)
    code: str = ""

    @property
    def pictures(self) -> list[str]:
        return [base64.b64encode(image).decode() for image in self.images]


@dataclass
class Page:
    """What a page says: the answers on top, what may not be read into them, then the sections."""

    title: str
    subtitle: str
    answers: list[str]
    caution: str
    sections: list[Section]
    warnings: list[str] = field(default_factory=list)


def render(path: Path, page: Page) -> Path:
    """Write a self-contained HTML page; names from files are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnssl_ext.study", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.j2").render(page=page)
    with replaced_on_success(path) as temporary:
        temporary.write_text(text)
    return path


def render_markdown(path: Path, page: Page) -> Path:
    """Write the same as Markdown, with its pictures as files in a folder beside it, named after it."""
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    parts = [f"# {page.title}", page.subtitle, *(f"**{answer}**" for answer in page.answers)]
    parts += [*(f"> **{warning}**" for warning in page.warnings), page.caution]
    number = 0
    for section in page.sections:
        parts += [f"## {section.title}", *section.paragraphs]
        if section.table:
            parts.append(_markdown_table(section.table))
        for image in section.images:
            number += 1
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(image)
            parts.append(f"![{section.title}]({folder.name}/{number}.png)")
        if section.code:
            parts.append(f"```bash\n{section.code}\n```")
    with replaced_on_success(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    return path


def _markdown_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [[f"**{cell}**" for cell in row] if table.total and row is table.rows[-1] else row for row in table.rows]
    return "\n".join([line(table.head), "|" + "---|" * len(table.head), *map(line, rows)])
