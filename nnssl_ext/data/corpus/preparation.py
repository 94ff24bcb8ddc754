"""One item of a corpus, read, checked and preprocessed by nnU-Net's own preprocessor: what a worker process does."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl_ext.data.corpus.manifest import KEPT, NO_IMAGE, UNUSABLE, Entry
from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.data.corpus.volumes import (
    MOST_VOXELS,
    NotAnImage,
    Unusable,
    Volume,
    files_digest,
    read_file,
    read_series,
    reason,
)
from nnssl_ext.data.index import CaseRecord, record_of
from nnssl_ext.recipe import read_json


class NotWrittenError(Exception):
    """A case could not be written; a plain exception, so that it passes between processes as it is."""


@dataclass(frozen=True)
class Target:
    """Where a worker finds how to preprocess, and where it puts what it makes.

    Attributes:
        plans: File of the corpus's plans.
        configuration: Of the plans.
        dataset_json: File of the corpus's dataset.json.
        scratch: Folder for unfinished cases.
        contents: File that lists what earlier calls have made: it is not preprocessed again.
    """

    plans: Path
    configuration: str
    dataset_json: Path
    scratch: Path
    contents: Path


@dataclass
class Prepared:
    """What became of one volume: its entry and, if it is kept, its record and the folder of its files."""

    entry: Entry
    record: CaseRecord | None = None
    folder: Path | None = None


def start_worker() -> None:
    """No threads inside, no warnings about every odd header, and no life of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is for the first process, which ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare(item: Item, target: Target) -> list[Prepared]:
    """Read an item and preprocess the cases it makes; files that are no use come back as entries, never as errors.

    Raises:
        NotWrittenError: If a case cannot be written.
        MemoryError: If there is too little.
    """
    results: list[Prepared] = []
    try:
        stamp = item.stamp()
        sha256 = files_digest(list(item.files)) if not item.dicom else _folder_digest(item.files[0])
    except OSError as error:
        return [Prepared(_entry(item, [0, 0, 0], "", Unusable(f"cannot be read: {error.strerror}")))]
    for group, volumes in _read(item, _managers(target, item.normalization)[0]):
        entry = _entry(item, stamp, sha256)
        entry.channels = item.channels(group) if group else item.channels()
        results.append(Prepared(entry))
        try:
            if isinstance(volumes, Unusable):
                raise volumes
            _describe(entry, volumes)
            entry.status = KEPT
            if entry.content in _contents(target):
                continue
            folder = Path(tempfile.mkdtemp(dir=target.scratch))
            results[-1].record = _preprocess(volumes, folder / entry.case, target, item.normalization)
            results[-1].folder = folder
        except Unusable as verdict:
            _leave_out(entry, verdict)
        except (NotWrittenError, MemoryError):  # not the file's fault
            raise
        except Exception as error:  # whatever a strange file does to ITK or nnU-Net
            _leave_out(entry, Unusable(f"cannot be preprocessed: {type(error).__name__}: {reason(error)}"))
    return results


def _read(item: Item, plans: PlansManager) -> Iterator[tuple[tuple[int, ...], list[Volume] | Unusable]]:
    """(channels, volumes or why there are none) of each case of an item."""
    canonical = plans.image_reader_writer_class.__name__.endswith("WithReorient")
    if item.dicom:
        for found in read_series(item.files[0], canonical):
            yield item.groups[0], found if isinstance(found, Unusable) else [found]
        return
    try:
        volumes = [volume for name in item.files for volume in read_file(name, canonical)]
        if len(volumes) != len(item.names):
            kind = "is 4-D" if len(item.names) == 1 else "does not fit its dataset.json"
            raise Unusable(f"{kind}: {len(volumes)} volumes in {len(item.files)} file, expected {len(item.names)}")
    except Unusable as verdict:
        yield (), verdict
        return
    for group in item.groups:
        yield group, [volumes[n] for n in group]


def _describe(entry: Entry, volumes: list[Volume]) -> None:
    """Note what the case is, then raise Unusable if it is of no use."""
    first = volumes[0]
    entry.shape, entry.spacing = list(first.array.shape), [float(edge) for edge in first.spacing]
    entry.orientation, entry.modality, entry.series = first.orientation, first.modality, first.series
    for volume in volumes:
        volume.check()
        if volume.array.shape != first.array.shape or not np.allclose(volume.spacing, first.spacing, rtol=1e-3):
            raise Unusable(
                f"has channels of different size: {volume.array.shape} at {volume.spacing} mm, the first has "
                f"{first.array.shape} at {first.spacing} mm"
            )
    digests = [volume.digest() for volume in volumes]
    entry.content = hashlib.sha256(b"".join(digests)).hexdigest()
    stem = re.sub(r"\.(nii\.gz|nii|nrrd|mha)$", "", Path(entry.files[0]).name)
    name = re.sub(r"[^A-Za-z0-9]+", "-", stem)[:40].strip("-") or "case"
    entry.case = f"{name}_{entry.content[:12]}"


def _preprocess(volumes: list[Volume], output: Path, target: Target, scheme: str) -> CaseRecord:
    """nnU-Net's own preprocessing without labels, saved as it saves; the record spares the index from reading it."""
    plans, configuration = _managers(target, scheme)
    properties: dict[str, Any] = {"spacing": list(volumes[0].spacing), "sitk_stuff": volumes[0].geometry}
    data = np.stack([volume.array for volume in volumes])
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = [data.shape[1:][axis] for axis in plans.transpose_forward]
    resampled = [int(edge) for edge in compute_new_shape(shape, spacing, configuration.spacing)]
    if min(resampled) < 2 or int(np.prod(resampled, dtype=object)) > MOST_VOXELS:
        raise Unusable(f"would have size {resampled} at the target's spacing")
    preprocessor = configuration.preprocessor_class(verbose=False)
    dataset_json = _dataset_json(target)
    case = preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset_json)
    record = record_of(case[0])
    if record.problem:
        raise Unusable(f"{record.problem} once it is normalised and resampled")
    case[2]["class_locations"] = {}  # nobody has labelled anything
    preprocessor.run_case = lambda *_: case  # stock saves what stock read; this was read by us
    try:
        preprocessor.run_case_save(str(output), [], None, plans, configuration, dataset_json)
    except Exception as error:  # blosc2 and pickle each have their own
        raise NotWrittenError(f"cannot write to {target.scratch.parent}: {reason(error)}") from error
    return record


@lru_cache
def _managers(target: Target, scheme: str) -> tuple[PlansManager, ConfigurationManager]:
    plans = read_json(target.plans)
    if scheme:
        plans = with_normalization(plans, target.configuration, scheme)
    manager = PlansManager(plans)
    return manager, manager.get_configuration(target.configuration)


@lru_cache
def _contents(target: Target) -> frozenset[str]:
    return frozenset(read_json(target.contents, list))


@lru_cache
def _dataset_json(target: Target) -> dict:
    return read_json(target.dataset_json)


def with_normalization(plans: dict, configuration: str, scheme: str) -> dict:
    """Plans whose configuration normalises every channel by ``scheme``; nothing else differs."""
    result = deepcopy(plans)
    channels = len(PlansManager(plans).get_configuration(configuration).normalization_schemes)
    result["configurations"][configuration]["normalization_schemes"] = [scheme] * channels
    return result


def _entry(item: Item, stamp: list[int], sha256: str, verdict: Unusable | None = None) -> Entry:
    entry = Entry(
        item.source,
        list(item.files),
        stamp,
        channels=item.channels(),
        sha256=sha256,
        normalization=item.normalization,
    )
    if verdict:
        _leave_out(entry, verdict)
    return entry


def _leave_out(entry: Entry, verdict: Unusable) -> None:
    entry.status = NO_IMAGE if isinstance(verdict, NotAnImage) else UNUSABLE
    entry.reason, entry.case = " ".join(str(verdict).split()), ""


def _folder_digest(folder: str) -> str:
    return files_digest(sorted(str(path) for path in Path(folder).iterdir() if path.is_file()))
