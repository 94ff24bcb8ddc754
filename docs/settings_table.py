"""Write the tables of all settings into docs/reference/settings.md."""

import re
from pathlib import Path

from nnssl_ext.cli.methods import settings_tables

PAGE = Path(__file__).parent / "reference" / "settings.md"
PLACE = re.compile(r"(?<=<!-- settings: begin -->\n).*(?=\n<!-- settings: end -->)", re.DOTALL)

if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: settings_tables(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
