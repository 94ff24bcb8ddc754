"""Write the recipes plans/METHOD.json: every setting of a method at its default, as a template."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from nnssl_ext.methods import METHODS, Method

LIST = re.compile(r"\[\s+([^][{}]*?)\s+\]")
PLANS = Path(__file__).resolve().parents[1] / "plans"


def default_recipe(method: type[Method]) -> str:
    """Render a method's recipe as JSON, lists on one line."""
    content = {
        "description": f"{method.title}: every setting at its default, as a template.",
        "nnssl_ext": {method.name: asdict(method.Settings())},
    }
    text = json.dumps(content, indent=4)
    return LIST.sub(lambda found: "[" + ", ".join(map(str.strip, found[1].split(","))) + "]", text) + "\n"


def main() -> None:
    for name, method in METHODS.items():
        (PLANS / f"{name}.json").write_text(default_recipe(method))


if __name__ == "__main__":
    main()
