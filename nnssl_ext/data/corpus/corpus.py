"""Build a pretraining data set by another data set's plans.

The result is an ordinary preprocessed nnU-Net data set: stock ``nnUNetv2_train`` pretrains on it, and the checkpoint
fits the other data set. Cases appear whole or not at all. A second call adds new files.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nnssl_ext.configurations import PROPERTIES, configuration_of, intensities_of, unusable
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.corpus import TARGET_KEY
from nnssl_ext.data.corpus.manifest import DUPLICATE, KEPT, NO_IMAGE, UNUSABLE, Entry, Manifest
from nnssl_ext.data.corpus.pool import Lost, WorkerPool
from nnssl_ext.data.corpus.preparation import CorpusTarget, Prepared, left_out, prepare
from nnssl_ext.data.corpus.sources import Item, NotRead, channel_names
from nnssl_ext.data.corpus.volumes import NotWrittenError, Unusable
from nnssl_ext.data.index import CaseIndex, CaseRecord
from nnssl_ext.errors import UserError
from nnssl_ext.files import lock_file
from nnssl_ext.recipe import read_json, write_json

#: Least seconds between two writes of manifest and index: the work that a killed call loses.
KEEP_SECONDS = 60
#: Share of the time that these writes may take. They grow with the corpus.
KEEP_SHARE = 0.05
#: Files that are named when too many are damaged.
SHOWN = 20
#: Seconds that an item may take, and seconds per MiB of its files.
ITEM_SECONDS, SECONDS_PER_MIB = 600, 2
#: Keys of a configuration that decide how a case looks after preprocessing.
PREPROCESSING = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
#: The same of the plans.
PLAN_WIDE = ("transpose_forward", "image_reader_writer", PROPERTIES)


@dataclass
class Corpus:
    """Preprocess unlabeled images like a target data set.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.
        like: The target's folder there.
        plans: Name of the target's plans.
        configuration: Of the plans; 3-D.
    """

    folder: Path
    like: Path
    plans: str
    configuration: str
    processes: int = 1

    def __post_init__(self) -> None:
        plans = read_json(self.like / f"{self.plans}.json")
        self._plans = {PROPERTIES: intensities_of(plans), **plans}
        self._configuration = configuration_of(self._plans, self.configuration)
        if reason := unusable(self.configuration, self._configuration, "give"):
            raise UserError(reason)
        self.data = self.folder / self._configuration["data_identifier"]
        self.target_json = read_json(self.like / "dataset.json")
        # a call that ended before its first case leaves hidden files
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if "corpus.json" not in names and not all(name.startswith(".") for name in names):
            raise UserError(f"{self.folder} exists and is no corpus. Give another -d and -n")
        #: Files of the items that this call has read.
        self._read_now: set[frozenset[str]] = set()
        self.channels = channel_names(self.target_json, self.like / "dataset.json")
        #: The plan's schemes, one per channel.
        self.normalization: list[str] = self._configuration["normalization_schemes"]

    def manifest(self) -> Manifest:
        """Read the corpus's manifest."""
        return Manifest.load(self.folder / "corpus.json", self._head())

    def add(
        self,
        items: Sequence[Item],
        max_failures: float,
        retry: bool = False,
        not_read: Mapping[str, NotRead] | None = None,
    ) -> Manifest:
        """Preprocess the items that are not there yet.

        Args:
            items: Of all sources.
            max_failures: Percentage of damaged volumes that is accepted.
            retry: Read unusable items again.
            not_read: By source, files that are not read, for the manifest.

        Raises:
            UserError: If more are damaged. The cases made by then stay, and a later call continues.
        """
        with lock_file(self.folder / ".nnssl_ext_corpus.lock", f"the corpus {self.folder.name}"):
            manifest = self.manifest()
            for source, files in (not_read or {}).items():
                manifest.not_read[source] = {kind: len(names) for kind, names in sorted(files.items())}
            manifest.write()
            scratch = self.folder / "nnssl_ext_unfinished"
            shutil.rmtree(scratch, ignore_errors=True)  # what a killed call left
            self.data.mkdir(exist_ok=True)
            scratch.mkdir(exist_ok=True)
            try:
                self._fill(manifest, items, scratch, max_failures, retry)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            if not manifest.counts()[KEPT]:
                raise UserError(f"no volume of the sources can be used. {self.folder / 'corpus.json'} says why")
            self._describe(self.folder, manifest)
        return manifest

    def _fill(self, manifest: Manifest, items: Sequence[Item], scratch: Path, max_failures: float, retry: bool) -> None:
        cases = set(list_cases(self.data))
        for case in manifest.lose(cases):
            self._remove(case)
        new = [item for item in items if not manifest.knows(item, cases, retry)]
        known = {frozenset(item.files) for item in items} - {frozenset(item.files) for item in new}
        limit = Limit(max_failures, len(items))
        for files in known:
            limit.count(manifest.entries[files])
        limit.check()
        target = self._target(manifest, scratch, new)
        records: dict[str, CaseRecord] = {}
        keep_at = time.monotonic() + KEEP_SECONDS
        bar = tqdm(total=len(new), desc="Preprocessing", unit="file", disable=not new or not sys.stderr.isatty())
        try:
            with bar:
                for item, results, lost in self._results(new, target):
                    before = manifest.entries.get(frozenset(item.files), [])
                    if (lost or _absent(results, before)) and any(entry.status == KEPT for entry in before):
                        bar.write(f"{results[0].entry}. Its case stays as it is", sys.stderr)
                        limit.count(before)
                    else:
                        self._replace(manifest, item, results, records)
                        limit.count([result.entry for result in results])
                    bar.update()
                    limit.check()
                    if (begin := time.monotonic()) > keep_at:
                        self._keep(manifest, records)
                        end = time.monotonic()
                        keep_at = end + max(KEEP_SECONDS, (end - begin) / KEEP_SHARE)
        finally:
            self._keep(manifest, records)
        # of a killed call whose files have changed since
        for case in set(list_cases(self.data)) - {*manifest.kept.values()}:
            self._remove(case)

    def _target(self, manifest: Manifest, scratch: Path, new: Sequence[Item]) -> CorpusTarget:
        """Write what the workers read: settings, and contents that have a case already.

        What is read again keeps its own cases, unless it is to be normalized otherwise.
        """
        self._describe(scratch, manifest)
        again = {frozenset(item.files): item.normalization for item in new}
        contents: dict[str, list[str] | None] = {}
        for entry in manifest.all():
            scheme = again.get(frozenset(entry.files))
            if entry.status == KEPT and scheme in (None, entry.normalization):
                contents[entry.content] = None if scheme is None else entry.files
        write_json(contents, scratch / "contents.json")
        return CorpusTarget(scratch, self.plans, self.configuration)

    def _results(self, items: Sequence[Item], target: CorpusTarget) -> Iterator[tuple[Item, list[Prepared], bool]]:
        """Yield items with their results, and whether a worker was lost.

        They come in order, so that the first of duplicates is kept.
        """
        pool = WorkerPool(partial(prepare, target=target), min(self.processes, len(items)), _time_limit)
        try:
            for item, result in zip(items, pool.run(items), strict=True):
                lost = isinstance(result, Lost)
                yield item, [Prepared(left_out(item, Unusable(result.reason)))] if lost else result, lost
        except NotWrittenError as error:
            raise UserError(f"{error}. Make room and call again, it goes on where it stopped") from error

    def _replace(
        self, manifest: Manifest, item: Item, results: Sequence[Prepared], records: dict[str, CaseRecord]
    ) -> None:
        """Put an item's results in the place of its earlier ones.

        Entries have no stamp until all are there, so that an unfinished item is read again.
        """
        self._read_now.add(frozenset(item.files))
        orphans = manifest.forget(item)
        stamps = [result.entry.stamp for result in results]
        for result in results:
            result.entry.stamp = []
        for result in results:
            self._take(manifest, result, records, orphans)
        for case in orphans.values():
            self._remove(case)
        for result, stamp in zip(results, stamps, strict=True):
            result.entry.stamp = stamp

    def _take(
        self, manifest: Manifest, result: Prepared, records: dict[str, CaseRecord], orphans: dict[str, str]
    ) -> None:
        """Move a prepared case to its place, unless it is a duplicate or there already."""
        entry = result.entry
        twin = manifest.kept.get(entry.content) if entry.status == KEPT else None
        there = orphans.pop(entry.content, "") if entry.status == KEPT else ""
        if twin and result.folder is not None and self._replaces(manifest.holder(entry.content), entry):
            manifest.resign(entry.content, entry.case)
            there, twin = twin, None
        if twin:
            entry.status, entry.reason, entry.case = DUPLICATE, f"same content as case {twin}", ""
        elif result.folder is not None and result.record is not None:
            # the data last: a case is one when its data is there
            for suffix in (".pkl", "_seg.b2nd", ".b2nd"):
                name = f"{entry.case}{suffix}"
                (result.folder / name).replace(self.data / name)
            records[entry.case] = result.record
            if there not in ("", entry.case):
                self._remove(there)
        elif there:
            entry.case = there
        if result.folder is not None:
            shutil.rmtree(result.folder)
        manifest.add(entry)

    def _replaces(self, holder: Entry, entry: Entry) -> bool:
        """Return whether a volume that was normalized anew replaces an equal one of an earlier call."""
        return frozenset(holder.files) not in self._read_now and holder.normalization != entry.normalization

    def _keep(self, manifest: Manifest, records: dict[str, CaseRecord]) -> None:
        manifest.write()
        CaseIndex.build(self.data, known=records)
        records.clear()

    def _remove(self, case: str) -> None:
        for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
            (self.data / f"{case}{suffix}").unlink(missing_ok=True)

    def _head(self) -> dict:
        preprocessing = {key: self._configuration[key] for key in PREPROCESSING}
        preprocessing |= {key: self._plans[key] for key in PLAN_WIDE}
        head = {
            "target": self.like.name,
            "plans": self.plans,
            "configuration": self.configuration,
            "preprocessing": preprocessing,
        }
        return json.loads(json.dumps(head))

    def _describe(self, folder: Path, manifest: Manifest) -> None:
        """Write the files that stock expects beside the cases."""
        labels = {key: self.target_json[key] for key in ("labels", "regions_class_order") if key in self.target_json}
        dataset_json = {
            "name": self.folder.name,
            "description": f"images without labels, preprocessed like {self.like.name}, made by nnssl_ext corpus",
            "channel_names": {str(number): name for number, name in enumerate(self.channels)},
            # the target's: some networks depend on the number of classes, and the checkpoint is for the target
            **labels,
            "numTraining": manifest.counts()[KEPT],
            "file_ending": self.target_json["file_ending"],
            TARGET_KEY: self.like.name,
        }
        properties = self._plans[PROPERTIES]
        write_json(dataset_json, folder / "dataset.json")
        write_json({**self._plans, "dataset_name": self.folder.name}, folder / f"{self.plans}.json")
        fingerprint = {PROPERTIES: properties}
        write_json(fingerprint, folder / "dataset_fingerprint.json")


def _time_limit(item: Item) -> float:
    return ITEM_SECONDS + SECONDS_PER_MIB * item.stamp()[1] / 2**20


def _absent(results: Sequence[Prepared], before: Sequence[Entry]) -> bool:
    """Return whether files are not there today, which is no reason to lose what was made of them."""
    found, earlier = results[0].entry.stamp[0], (before[0].stamp or [0])[0] if before else 0
    unusable = any(result.entry.status == UNUSABLE for result in results)
    return unusable and (found == 0 or found < earlier)


class Limit:
    """Limit damaged volumes.

    Intact files that are no image do not count.

    Args:
        percent: Of all volumes.
        items: Number of items, read or not. A DICOM folder may hold several volumes, so the number of volumes is
            projected from the items that were read.
    """

    def __init__(self, percent: float, items: int) -> None:
        self.percent, self.items = percent, items
        self.read = self.volumes = 0
        self.unusable: list[Entry] = []

    def count(self, entries: Sequence[Entry]) -> None:
        """Count the volumes of one item."""
        self.read += 1
        self.volumes += sum(entry.status != NO_IMAGE for entry in entries)
        self.unusable += [entry for entry in entries if entry.status == UNUSABLE]

    def check(self) -> None:
        """List the damaged volumes if there are too many.

        Raises:
            UserError: Then.
        """
        total = round(self.volumes + (self.items - self.read) * max(1.0, self.volumes / max(1, self.read)))
        if len(self.unusable) <= self.percent / 100 * total:
            return
        for entry in self.unusable[:SHOWN]:
            print(f"  {entry}", file=sys.stderr)
        raise UserError(
            f"{len(self.unusable)} of {total} volumes cannot be used, more than --max-failures {self.percent:g}. Mend "
            f"or remove them, or allow more. A later call goes on from what was made so far"
        )
