"""Write a result page as HTML and Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from nnssl_ext.files import replaced_on_success


@dataclass
class Table:
    """A table. ``total`` sets its last row in bold."""

    head: list[str]
    rows: list[list[str]]
    total: bool = False


@dataclass
class Picture:
    """A PNG with its caption. ``wide`` gives it the width of the page."""

    image: bytes
    caption: str = ""
    wide: bool = False

    @property
    def encoded(self) -> str:
        """Return the image for a data URL."""
        return base64.b64encode(self.image).decode()


@dataclass
class Section:
    """Hold a part of a page. Text is escaped later.

    Attributes:
        title: Heading.
        paragraphs: Text above everything else.
        table: A table.
        plots: Wide pictures, side by side where there is room.
        tiles: Rows of small pictures, each row with its title.
        code: Commands.
        folded: Show the heading only, until a reader opens it.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[Picture] = ()
    tiles: Sequence[tuple[str, Sequence[Picture]]] = ()
    code: str = ""
    folded: bool = False


@dataclass
class Page:
    """Hold a page: summary, limits, sections."""

    title: str
    subtitle: str
    summary: Table
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    plots: Sequence[Picture] = ()
    warnings: Sequence[str] = field(default_factory=list)


def render(path: Path, page: Page) -> Path:
    """Write a self-contained HTML page with escaped text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnssl_ext.study", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.j2").render(page=page)
    with replaced_on_success(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render_markdown(path: Path, page: Page) -> Path:
    """Write the page and its pictures as Markdown."""
    folder = path.with_suffix("")
    number = 0

    def link(picture: Picture, title: str) -> str:
        nonlocal number
        number += 1
        folder.mkdir(parents=True, exist_ok=True)
        with replaced_on_success(folder / f"{number}.png") as temporary:
            temporary.write_bytes(picture.image)
        return f"![{picture.caption or title}]({folder.name}/{number}.png)"

    parts = [f"# {page.title}", page.subtitle, _markdown_table(page.summary)]
    parts += [link(picture, page.title) for picture in page.plots]
    parts += [f"> {warning}" for warning in page.warnings]
    parts += page.notes
    for section in page.sections:
        parts += [f"## {section.title}", *section.paragraphs]
        if section.table:
            parts.append(_markdown_table(section.table))
        parts += [link(picture, section.title) for picture in section.plots]
        for title, pictures in section.tiles:
            captions = [picture.caption for picture in pictures]
            images = [link(picture, title) for picture in pictures]
            parts += [title, _markdown_table(Table(captions, [images]))]
        if section.code:
            parts.append(f"```bash\n{section.code}\n```")
    for file in folder.glob("*.png"):  # of a longer report before this one
        if file.stem.isdigit() and int(file.stem) > number:
            file.unlink(missing_ok=True)
    with replaced_on_success(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _markdown_table(table: Table) -> str:
    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entry.replace("|", "\\|").replace("\n", " ") for entry in entries) + " |"

    rows = [[f"**{entry}**" for entry in row] if table.total and row is table.rows[-1] else row for row in table.rows]
    return "\n".join([line(table.head), "|" + "---|" * len(table.head), *map(line, rows)])
