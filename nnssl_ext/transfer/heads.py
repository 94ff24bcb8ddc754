"""Match outputs of two networks by label names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: A row of the target's outputs and the source's row of the same name.
Rows = tuple[tuple[int, int], ...]


def output_names(dataset_json: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """List output names, and whether they are regions.

    As nnU-Net's LabelManager: without regions one output for each label but 'ignore', by ascending value; with regions
    one for each of them, in the order of dataset.json, without the background.
    """
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    values = {name: tuple(v) if isinstance(v, (list, tuple)) else (v,) for name, v in labels.items()}
    if any(len(value) > 1 for value in values.values()):
        return tuple(name for name, value in values.items() if set(map(int, value)) != {0}), True
    return tuple(sorted(values, key=lambda name: int(values[name][0]))), False


def matching_rows(target: Sequence[str], source: Sequence[str]) -> Rows:
    """Pair outputs of equal names: target and source row.

    The background alone is no match. It held what the target tells apart.
    """
    places = {name: row for row, name in enumerate(source)}
    shared = [name for name in target if name in places]
    return tuple((target.index(name), places[name]) for name in shared) if shared != ["background"] else ()
