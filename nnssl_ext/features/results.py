"""Write the table of vectors, its description, a picture and scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError
from nnssl_ext.features.classify import cross_validate
from nnssl_ext.features.extract import ALL, Extraction, Vectors
from nnssl_ext.features.pictures import draw_vectors
from nnssl_ext.files import file_digest, replaced_on_success
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.transfer.report import Report
from nnssl_ext.transfer.source import PretrainedWeights

CAUTION = (
    "Frozen features rank convolutional encoders wrongly for segmentation. Compare weights by fine-tuning: "
    "nnssl_ext study."
)
#: Entries of features.json that a call to go on must share.
SAME = ("checkpoint", "plans", "stages", "pool", "maps")


def settings(source: PretrainedWeights, extraction: Extraction, report: Report) -> dict[str, Any]:
    """Describe how the vectors are made, as JSON values."""
    plans, encoder, components = extraction.plans, extraction.encoder, extraction.components
    configuration, parts = plans.configuration, 8 if extraction.pool == "octants" else 1
    return {
        "checkpoint": {"file": source.path.name, "kind": source.kind, "sha256": file_digest(source.path)},
        "plans": {
            "name": plans.plans.plans_name,
            "configuration": plans.configuration_name,
            "trainer": plans.trainer,
            "sha256": hashlib.sha256(json.dumps(plans.plans.plans, sort_keys=True).encode()).hexdigest(),
            "spacing": list(configuration.spacing),
            "patch_size": list(configuration.patch_size),
            "normalization": list(configuration.normalization_schemes),
        },
        "stages": [
            {
                "stage": stage,
                "stride": list(encoder.strides[stage]),
                "channels": encoder.channels[stage],
                "columns": parts * encoder.channels[stage],
            }
            for stage in extraction.stages
        ],
        "pool": extraction.pool,
        "maps": "none" if components is None else "all channels" if components == ALL else f"{components} components",
        "matched": report.as_dict(),
        "caution": CAUTION,
        "versions": versions(),
        "revision": revision(),
    }


def check_settings(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse a folder with features of other settings. A new folder gets features.json.

    Raises:
        UserError: With the first setting that differs.
    """
    file = folder / "features.json"
    if file.is_file():
        earlier = read_json(file)
        for key in SAME:
            if earlier.get(key) != content[key]:
                shown = [json.dumps(side.get(key)) for side in (earlier, content)]
                raise UserError(f"Expected {key} {shown[0][:200]} as in {file}, got {shown[1][:200]}. Give another -o")
    else:
        write_json(content, file)


def write(
    folder: Path, content: dict[str, Any], found: Mapping[str, Vectors], labels: pd.DataFrame | None, parquet: bool
) -> None:
    """Write the table and features.json, and draw the vectors.

    With labels, classifiers are cross-validated.

    Args:
        content: Of ``settings``.
        found: Case -> vectors.
        labels: Label and group by case, or None.
        parquet: Write parquet, if pyarrow is there.

    Raises:
        UserError: If no case has vectors.
    """
    rows = [
        (case, region, stage, values)
        for case, regions in sorted(found.items())
        for region, stages in regions.items()
        for stage, values in stages.items()
    ]
    if not rows:
        raise UserError("Expected vectors, got none: no case could be read. Check the files")
    columns = [f"f{number}" for number in range(max(len(values) for *_, values in rows))]
    # stages of fewer channels leave the last columns empty
    table = np.full((len(rows), len(columns)), np.nan, np.float32)
    for row, (*_, values) in zip(table, rows, strict=True):
        row[: len(values)] = values
    keys = pd.DataFrame([row[:3] for row in rows], columns=["case", "region", "stage"])
    frame = pd.concat([keys, pd.DataFrame(table, columns=columns)], axis=1)
    if parquet and find_spec("pyarrow") is None:
        print("pyarrow is not installed: features.csv is written instead. pip install pyarrow, and call again")
    name = "features.parquet" if parquet and find_spec("pyarrow") else "features.csv"
    with replaced_on_success(folder / name) as temporary:
        if name.endswith(".csv"):
            frame.to_csv(temporary, index=False, float_format="%.8g")
        else:
            frame.to_parquet(temporary, engine="pyarrow", index=False)
    regions = sorted({region for _, region, *_ in rows})
    write_json({**content, "cases": sorted(found), "regions": regions, "table": name}, folder / "features.json")
    _draw(folder, rows, labels)
    print(f"wrote {folder}: {name} ({len(rows)} rows), features.json, features.png, map.png")
    if labels is not None:
        _classify(folder, rows, labels)


def _draw(folder: Path, rows: Sequence[tuple], labels: pd.DataFrame | None) -> None:
    known = {} if labels is None else labels["label"].to_dict()
    stages = sorted({stage for _, _, stage, _ in rows})
    several = len({region for _, region, *_ in rows}) > 1
    chosen = {stage: [row for row in rows if row[2] == stage] for stage in stages}
    words = [[known.get(case, ""), region if several else ""] for case, region, *_ in chosen[stages[0]]]
    vectors = {stage: np.stack([values for *_, values in part]) for stage, part in chosen.items()}
    draw_vectors(vectors, [", ".join(filter(None, pair)) for pair in words], folder / "features.png")


def _classify(folder: Path, rows: Sequence[tuple], labels: pd.DataFrame) -> None:
    """Print and write the scores of each region and stage."""
    known = labels.T.to_dict()
    parts: dict[tuple[str, int], list[tuple]] = {}
    for case, region, stage, values in rows:
        if case in known:
            parts.setdefault((region, stage), []).append((values, known[case]["label"], known[case]["group"]))
    if not parts:
        raise UserError(f"Expected labels of the extracted cases, got {next(iter(known))}, ... Correct the column case")
    cases = {case for case, *_ in rows}
    for names, what in ((cases - set(known), "without a label"), (set(known) - cases, "labeled, but not extracted")):
        if names:
            print(f"{len(names)} cases are {what}: {shorten(sorted(names))}")
    scores: list[dict] = []
    refused: list[UserError] = []
    for (region, stage), members in sorted(parts.items()):
        vectors, kinds, groups = zip(*members, strict=True)
        try:
            found = cross_validate(np.stack(vectors), kinds, groups)
        except UserError as error:  # such as a region that few cases have
            print(f"{region}, stage {stage}, is not classified: {error.line}")
            refused.append(error)
            continue
        scores += [{"region": region, "stage": stage, **asdict(score)} for score in found]
    if not scores:
        raise refused[0]
    table = pd.DataFrame(scores)
    with replaced_on_success(folder / "classification.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.4f")
    print("balanced accuracy [95 %], cross-validated")
    for row in scores:
        interval = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}], chance {row['chance']:.3f}"
        sizes = f"{row['cases']} cases, {row['groups']} groups, {row['folds']} folds"
        print(f"  {row['region']:20} stage {row['stage']}  {row['classifier']:20} {interval}  {sizes}")
    if len(scores) > 1:
        print("Intervals are not adjusted for choosing the best of several rows.")
