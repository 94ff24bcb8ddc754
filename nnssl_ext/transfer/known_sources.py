"""List published pretrained weights that ``nnssl_ext transfer`` takes.

The facts in ``known_sources.json`` are those of the model pages. "?" stands for what a page does not state. Tests read
files of the same layouts with random values, not the published files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownSource:
    """Published weights.

    Attributes:
        what: The network and its pretraining.
        data: What it was pretrained on.
        modality: Of the images.
        license: Of the weights, as the page states it.
        normalization: nnU-Net's scheme, or what stands for it.
        spacing: Millimeters, or how voxels were chosen.
        size: Parameters or bytes.
        fits: Networks that it fits, and how to get them.
        tested: "layout", or "layout and function" where outputs were compared with the original code's.
        address: The page.
        repository: On Hugging Face; '' where the file has to be downloaded by hand.
        file: In the repository; '' for checkpoint_final.pth with its adaptation plan.
    """

    what: str
    data: str
    modality: str
    license: str
    normalization: str
    spacing: str
    size: str
    fits: str
    tested: str
    address: str
    repository: str = ""
    file: str = ""


KNOWN_SOURCES = {
    name: KnownSource(**facts)
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
