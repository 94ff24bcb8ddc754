"""The commands that documents show."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import REPOSITORY


def shown_lines(document: str, mark: str) -> list[str]:
    """The lines of a document's bash block that is marked as tested."""
    text = (REPOSITORY / document).read_text()
    match = re.search(rf"<!-- tested: {mark} -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert match, mark
    return match[1].strip().splitlines()


def own_commands(document: Path) -> list[str]:
    """The nnssl_ext commands of a document's bash blocks, without those that show a syntax in brackets."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("nnssl_ext ") and " [" not in line]
