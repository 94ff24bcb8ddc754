"""Write the tables of all settings into docs/reference/settings.md."""

import re
from dataclasses import fields
from pathlib import Path

from nnssl_ext.cli.methods import settings_tables
from nnssl_ext.methods import METHODS
from nnssl_ext.settings import settings_table
from nnssl_ext.views.augmentations import IntensitySettings

PAGE = Path(__file__).parent / "reference" / "settings.md"
PLACE = re.compile(r"(?<=<!-- settings: begin -->\n).*(?=\n<!-- settings: end -->)", re.DOTALL)
#: Name, default and section of an intensity setting's row.
ROW = re.compile(r"\| `(\w+)(\.intensity\.\w+)` \| [^|]+ \| (`[^|]+`) \|")


def page_tables() -> str:
    """Return the page's tables. Intensity transforms stand once, and per method where its default differs."""
    shared = settings_table(IntensitySettings, "METHOD.intensity.")
    defaults = {row[2]: row[3] for row in map(ROW.match, shared) if row}
    lines = settings_tables().splitlines()
    first = lines.index(f"### {next(iter(METHODS.values())).title}")
    without = [m.title for m in METHODS.values() if "intensity" not in {f.name for f in fields(m.Settings)}]
    section = [
        "### Intensity transforms",
        "",
        f"METHOD is the name of a method's section. All methods but {', '.join(without)} have these settings.",
        "A method's own table names those whose default is another.",
        "",
        *lines[2:4],
        *shared,
        "",
    ]
    own = [line for line in lines[first:] if not ((row := ROW.match(line)) and defaults.get(row[2]) == row[3])]
    return "\n".join([*lines[:first], *section, *own])


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: page_tables(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
