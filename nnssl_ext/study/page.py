"""The result page: one HTML file with everything in it."""

from __future__ import annotations

import base64
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


def render(path: Path, title: str, subtitle: str, answer: str, caution: str, sections: list[Section]) -> Path:
    """Write a self-contained page; names from files are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnssl_ext.study", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.j2").render(
        title=title, subtitle=subtitle, answer=answer, caution=caution, sections=sections
    )
    with replaced_on_success(path) as temporary:
        temporary.write_text(text)
    return path
