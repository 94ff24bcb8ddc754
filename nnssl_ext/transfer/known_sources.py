"""List published pretrained weights that ``nnssl_ext transfer`` takes.

The facts in ``known_sources.json`` are those of the model pages. "?" stands for what a page does not state. Tests read
files of the same layouts with random values, not the published files.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

#: Facts by short name. ``address`` is the page. ``repository`` is on Hugging Face; '' where the file has to be
#: downloaded by hand. ``file`` is in the repository; '' for checkpoint_final.pth with its adaptation plan. ``tested``
#: is "layout", or "layout and function" where outputs were compared with the original code's.
KNOWN_SOURCES = {
    name: SimpleNamespace(**{"repository": "", "file": "", **facts})
    for name, facts in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}


def described(name: str) -> str:
    """Describe a known source in lines."""
    source = KNOWN_SOURCES[name]
    rows = {
        "data": source.data,
        "modality": source.modality,
        "license": source.license,
        "normalization": source.normalization,
        "spacing (mm)": source.spacing,
        "size": source.size,
        "fits": source.fits,
        "tested": source.tested,
        "from": source.repository or source.address,
    }
    return "\n".join([f"{name}: {source.what}", *(f"  {key:<14}{value}" for key, value in rows.items())])
