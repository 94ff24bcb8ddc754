"""List the methods without importing torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from nnssl_ext.resources import PACKAGE


@dataclass(frozen=True)
class Entry:
    """Class attributes of a method, as ``Method`` declares them."""

    name: str
    title: str
    citation: str

    @property
    def trainer(self) -> str:
        """The name behind ``-tr``."""
        return trainer_of(self.title)


def trainer_of(title: str) -> str:
    """Return the trainer's name of a method's title."""
    return "nnsslTrainer_" + "".join(word[0].upper() + word[1:] for word in title.split())


def catalog() -> list[Entry]:
    """Read the methods' class attributes, sorted by title."""
    files = sorted((PACKAGE / "methods").rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return sorted((entry for tree in trees for entry in _entries(tree)), key=lambda entry: entry.title.lower())


def _entries(tree: ast.Module) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            values = {
                target.id: statement.value.value
                for statement in node.body
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
                for target in statement.targets
                if isinstance(target, ast.Name)
            }
            if {"name", "title", "citation"} <= values.keys():
                yield Entry(*(str(values[key]) for key in ("name", "title", "citation")))
