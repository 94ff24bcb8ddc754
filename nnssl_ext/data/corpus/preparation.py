"""Preprocess one item of a corpus by nnU-Net's preprocessor."""

from __future__ import annotations

import hashlib
import re
import tempfile
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

from nnssl_ext.data.corpus.dicom import is_dicom, read_folder
from nnssl_ext.data.corpus.manifest import KEPT, MAX_BYTES, NO_IMAGE, UNUSABLE, Entry
from nnssl_ext.data.corpus.readers import check_regular, image_suffix, last_line, read_image
from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.data.corpus.volumes import MAX_VOXELS, NotAnImage, NotWrittenError, Unusable, Volume
from nnssl_ext.data.index import CaseRecord, record_of
from nnssl_ext.files import file_digest
from nnssl_ext.recipe import read_json

#: Resampling to the target's spacing may multiply the voxels by this, a factor of ten per axis.
MAX_GROWTH = 1000
#: Degrees by which a channel may be turned, and part of a voxel's edge by which it may be shifted without a remark.
MAX_TURN, MAX_SHIFT = 0.5, 0.1
#: A reason that another normalization removes.
CONSTANT = "is constant once it is normalized and resampled"


@dataclass(frozen=True)
class CorpusTarget:
    """Describe how and where a worker preprocesses.

    Attributes:
        scratch: Folder for unfinished cases, with the corpus's plans and dataset.json, and with contents.json, which
            lists the cases of earlier calls. They are not preprocessed again.
        plans: Name of the plans.
        configuration: Of the plans.
    """

    scratch: Path
    plans: str
    configuration: str


@dataclass
class Prepared:
    """Hold a volume's entry, record and folder of files."""

    entry: Entry
    record: CaseRecord | None = None
    folder: Path | None = None


def prepare(item: Item, target: CorpusTarget) -> list[Prepared]:
    """Read an item and preprocess its cases.

    Unusable files come back as entries.

    Raises:
        NotWrittenError: If a case cannot be written.
        MemoryError: If there is too little.
    """
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    tempfile.tempdir = str(target.scratch)  # what a killed worker leaves is removed with it
    results: list[Prepared] = []
    try:
        stamp = item.stamp()
        sha256 = _item_digest(item)
    except OSError as error:
        return [Prepared(left_out(item, Unusable(f"cannot be read: {error.strerror}")))]
    except Unusable as verdict:
        return [Prepared(left_out(item, verdict))]
    for group, volumes in _read(item, _managers(target, item.normalization)[0]):
        entry = _entry(item, stamp, sha256)
        entry.channels = item.channels(group) if group else item.channels()
        results.append(Prepared(entry))
        try:
            if isinstance(volumes, Unusable):
                raise volumes
            _describe(entry, volumes)
            entry.status = KEPT
            if _contents(target).get(entry.content, []) in (None, entry.files):
                continue
            folder = Path(tempfile.mkdtemp())
            results[-1].record = _preprocess(volumes, folder / entry.case, target, item.normalization)
            results[-1].folder = folder
        except Unusable as verdict:
            _leave_out(entry, verdict)
        except (NotWrittenError, MemoryError):  # not the file's fault
            raise
        except Exception as error:  # whatever a strange file does to nnU-Net
            _leave_out(entry, Unusable(f"cannot be preprocessed: {type(error).__name__}: {last_line(error)}"))
    return results


def left_out(item: Item, verdict: Unusable) -> Entry:
    """Return the entry of an item without a case."""
    return _leave_out(_entry(item, item.stamp(), ""), verdict)


def _read(item: Item, plans: PlansManager) -> Iterator[tuple[tuple[int, ...], list[Volume] | Unusable]]:
    """Yield the channels of each case with its volumes, or with the reason why there are none."""
    canonical = plans.image_reader_writer_class.__name__.endswith("WithReorient")
    if item.dicom:
        for found in read_folder(item.files[0], canonical):
            yield item.groups[0], found if isinstance(found, Unusable) else [found]
        return
    try:
        single = len(item.names) == 1
        volumes = [volume for name in item.files for volume in read_image(name, canonical, single)]
        if len(volumes) != len(item.names):
            files = f"{len(item.files)} file{'s' if len(item.files) > 1 else ''}"
            raise Unusable(
                f"does not fit its dataset.json: {len(volumes)} volumes in {files}, expected {len(item.names)}"
            )
    except Unusable as verdict:
        yield (), verdict
        return
    for group in item.groups:
        yield group, [volumes[n] for n in group]


def _describe(entry: Entry, volumes: list[Volume]) -> None:
    """Note what the case is.

    Raises:
        Unusable: If it is of no use.
    """
    first = volumes[0]
    entry.shape, entry.spacing = list(first.array.shape), [round(edge, 6) for edge in first.spacing]
    entry.orientation, entry.modality, entry.series = first.orientation, first.modality, first.series
    entry.remarks = [remark for volume in volumes for remark in volume.remarks]
    name = Path(entry.files[0]).name
    for volume in volumes:
        volume.check(name)
        if volume.array.shape != first.array.shape or not np.allclose(volume.spacing, first.spacing, rtol=1e-3):
            raise Unusable(
                f"has channels of different size: {volume.array.shape} at {volume.spacing} mm, the first has "
                f"{first.array.shape} at {first.spacing} mm"
            )
        _check_place(entry, volume, first)
    digests = [volume.digest() for volume in volumes]
    entry.content = hashlib.sha256(b"".join(digests)).hexdigest()
    stem = name[: len(name) - len(image_suffix(name))]
    entry.case = f"{re.sub(r'[^A-Za-z0-9]+', '-', stem)[:40].strip('-') or 'case'}_{entry.content[:12]}"


def _check_place(entry: Entry, volume: Volume, first: Volume) -> None:
    """Compare where two channels lie.

    Another origin is a remark only: nnU-Net warns of it and stacks the channels voxel by voxel.

    Raises:
        Unusable: If their axes have other directions.
    """
    axes = [one.affine[:3, :3] / one.spacing[::-1] for one in (volume, first)]
    turn = float(np.degrees(np.arccos(np.clip(np.sum(axes[0] * axes[1], axis=0).min(), -1, 1))))
    if turn > MAX_TURN:
        raise Unusable(
            f"has channels turned by {turn:.1f} degrees against each other ({first.orientation} and "
            f"{volume.orientation}). Resample them to one grid"
        )
    shift = float(np.linalg.norm(volume.affine[:3, 3] - first.affine[:3, 3]))
    if shift > MAX_SHIFT * min(first.spacing):
        entry.remarks.append(f"its channels lie {shift:.3g} mm apart and are stacked voxel by voxel")


def _preprocess(volumes: list[Volume], output: Path, target: CorpusTarget, scheme: str) -> CaseRecord:
    """Preprocess without labels and save. Return the index record."""
    plans, configuration = _managers(target, scheme)
    properties: dict[str, Any] = {"spacing": list(volumes[0].spacing), "sitk_stuff": volumes[0].geometry}
    data = np.stack([volume.array for volume in volumes])
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = [data.shape[1:][axis] for axis in plans.transpose_forward]
    resampled = [int(edge) for edge in compute_new_shape(shape, spacing, configuration.spacing)]
    voxels = int(np.prod(resampled, dtype=object))
    if min(resampled) < 2 or voxels > MAX_VOXELS:
        raise Unusable(f"would have size {resampled} at the target's spacing")
    if voxels > MAX_GROWTH * int(np.prod(shape)):
        raise Unusable(
            f"would have size {resampled} at the target's spacing, {voxels // int(np.prod(shape))} times more"
        )
    preprocessor = configuration.preprocessor_class(verbose=False)
    dataset_json = _dataset_json(target)
    case = preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset_json)
    if min(case[0].shape[1:]) < 2:
        raise Unusable(f"has size {list(case[0].shape[1:])} once nnU-Net has cropped and resampled it")
    record = record_of(case[0])
    if record.problem:
        raise Unusable(CONSTANT if "constant" in record.problem else f"{record.problem} once it is normalized")
    case[2]["class_locations"] = {}  # nobody has labeled anything
    preprocessor.run_case = lambda *_: case  # stock saves what stock read; this was read by us
    try:
        preprocessor.run_case_save(str(output), [], None, plans, configuration, dataset_json)
    except MemoryError:  # the pool tries it again alone
        raise
    except Exception as error:  # blosc2 and pickle each have their own
        raise NotWrittenError(f"cannot write to {target.scratch.parent}: {last_line(error)}") from error
    return record


@lru_cache
def _managers(target: CorpusTarget, scheme: str) -> tuple[PlansManager, ConfigurationManager]:
    plans = read_json(target.scratch / f"{target.plans}.json")
    if scheme:
        plans = with_normalization(plans, target.configuration, scheme)
    manager = PlansManager(plans)
    return manager, manager.get_configuration(target.configuration)


@lru_cache
def _contents(target: CorpusTarget) -> dict[str, list[str] | None]:
    """Read which contents have a case already, and of which files alone that is so; None is of all."""
    return read_json(target.scratch / "contents.json", most=MAX_BYTES)


@lru_cache
def _dataset_json(target: CorpusTarget) -> dict:
    return read_json(target.scratch / "dataset.json")


def with_normalization(plans: dict, configuration: str, scheme: str) -> dict:
    """Set the normalization of every channel to ``scheme``."""
    result = deepcopy(plans)
    channels = len(PlansManager(plans).get_configuration(configuration).normalization_schemes)
    result["configurations"][configuration]["normalization_schemes"] = [scheme] * channels
    return result


def _entry(item: Item, stamp: list[int], sha256: str) -> Entry:
    return Entry(
        item.source,
        list(item.files),
        stamp,
        channels=item.channels(),
        sha256=sha256,
        normalization=item.normalization,
    )


def _leave_out(entry: Entry, verdict: Unusable) -> Entry:
    entry.status = NO_IMAGE if isinstance(verdict, NotAnImage) else UNUSABLE
    entry.reason, entry.kind, entry.case = " ".join(str(verdict).split()), verdict.kind, ""
    entry.series, entry.modality = entry.series or verdict.series, entry.modality or verdict.modality
    return entry


def _item_digest(item: Item) -> str:
    """Return the sha256 of an item's files."""
    if not item.dicom:
        for name in item.files:
            check_regular(name)
    digests = []
    for path in item.paths():
        if not item.dicom or is_dicom(path):  # nobody reads what lies beside DICOM files
            try:
                digests.append(file_digest(path))
            except OSError as error:
                raise Unusable(f"cannot be read: {path.name}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
