"""Record every volume of the sources in corpus.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json

KEPT, DUPLICATE, UNUSABLE, NO_IMAGE = "kept", "duplicate", "unusable", "no image"
#: Reason of a volume whose case somebody has removed.
GONE = "its preprocessed case is gone. Name its source again"
#: Raised when entries change their meaning. Version 1 kept DICOM and headers that are refused today.
VERSION = 2
#: Largest file that is read. An entry takes about a thousand bytes.
MAX_BYTES = 4 * 2**30
#: What is not said of all entries.
_BODY = ("version", "volumes", "counts", "not_read")


@dataclass
class Entry:
    """Record a case, or a volume that made none.

    Attributes:
        source: As named on the command line.
        files: Absolute paths: one file, one per channel, or a DICOM folder.
        stamp: ``Item.stamp`` of the files when they were read; empty: to be read again.
        status: kept, duplicate, unusable, or no image.
        reason: Why it was left out.
        kind: Of what is no image, as "localizer"; counted at the end of a call.
        case: Identifier of the preprocessed case.
        channels: Names of the channels taken; empty if unknown.
        series: UID of a DICOM series.
        sha256: Of the file, or of the files' digests.
        content: sha256 of voxels, shape and spacing.
        shape: D, H, W before preprocessing.
        spacing: In mm, D H W.
        orientation: As "LPS".
        modality: DICOM's; empty if unknown.
        normalization: nnU-Net's scheme where it is not the plan's.
        remarks: What is unusual, as "gantry tilt of 15.0 degrees corrected by dcm2niix".
    """

    source: str
    files: list[str]
    stamp: list[int]
    status: str = UNUSABLE
    reason: str = ""
    kind: str = ""
    case: str = ""
    channels: list[str] = field(default_factory=list)
    series: str = ""
    sha256: str = ""
    content: str = ""
    shape: list[int] = field(default_factory=list)
    spacing: list[float] = field(default_factory=list)
    orientation: str = ""
    modality: str = ""
    normalization: str = ""
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        series = f" (series {self.series})" if self.series else ""
        return f"{self.files[0]}{series}: {self.reason}"


class Manifest:
    """Keep the entries of a corpus.

    Args:
        path: Of corpus.json.
        head: What all entries share: the target and its preprocessing.

    Attributes:
        not_read: By source and kind, the number of files that are not read, as {"scans": {".pdf": 2}}.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.not_read: dict[str, dict[str, int]] = {}
        #: By the set of their files.
        self.entries: dict[frozenset[str], list[Entry]] = {}
        #: Case by content.
        self.kept: dict[str, str] = {}
        self._twins: dict[str, list[Entry]] = {}

    @classmethod
    def load(cls, path: Path, head: dict[str, Any]) -> Manifest:
        """Read a corpus's manifest. A missing one is empty.

        Raises:
            UserError: If it is of another target or an unknown version.
        """
        manifest = cls(path, head)
        if not path.is_file():
            return manifest
        content = read_json(path, most=MAX_BYTES)
        version = content.get("version")
        if version not in (1, VERSION):
            raise UserError(f"{path}: expected version {VERSION}, got {version!r}. Give another -d and -n.")
        stored = {key: value for key, value in content.items() if key not in _BODY}
        for key in sorted({*head, *stored}):
            if stored.get(key) != head.get(key):
                raise UserError(
                    f"{path} was made with another {key}. A corpus has one target and one preprocessing: give "
                    f"another -d and -n, or remove {path.parent}"
                )
        manifest.not_read = content.get("not_read", {})
        names = {entry.name for entry in fields(Entry)}
        added = {"kind", "remarks"} if version == 1 else set()
        for row in content.get("volumes", []):
            if set(row) != names - added:
                raise UserError(f"{path} is no manifest of this version. Remove {path.parent} and make it again")
            manifest.add(Entry(**{**row, "stamp": [] if version == 1 else row["stamp"]}))
        return manifest

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self.entries.setdefault(frozenset(entry.files), []).append(entry)
        if entry.status == KEPT:
            self.kept[entry.content] = entry.case
        elif entry.status == DUPLICATE:
            self._twins.setdefault(entry.content, []).append(entry)

    def knows(self, item: Item, cases: set[str], retry: bool = False) -> bool:
        """Return whether an item was read and its cases exist.

        Args:
            cases: Identifiers of the existing cases.
            retry: Unusable items count as unread.
        """
        found = self.entries.get(frozenset(item.files), [])
        read = sorted(entry.channels for entry in found)
        wanted = sorted(item.channels(group) for group in item.groups)
        # what cannot be read has one entry with all channels; a DICOM folder holds any number of volumes
        if not found or not (item.dicom or read in (wanted, [item.channels()])):
            return False
        stamp = item.stamp()
        return all(
            entry.files == list(item.files)
            # earlier stamps lack the checksum
            and entry.stamp
            and entry.stamp == stamp[: len(entry.stamp)]
            and entry.normalization == item.normalization
            and (entry.status != KEPT or entry.case in cases)
            and (entry.status != DUPLICATE or self.kept.get(entry.content) in cases)
            and not (retry and entry.status == UNUSABLE)
            for entry in found
        )

    def lose(self, cases: set[str]) -> list[str]:
        """Note which cases are gone and return them.

        The next item with such a case's content makes it again.

        Args:
            cases: Identifiers of the existing cases.
        """
        gone = [entry for entry in self.all() if entry.status == KEPT and entry.case not in cases]
        names = [entry.case for entry in gone]
        for entry in gone:
            self.kept.pop(entry.content, None)
            entry.status, entry.reason, entry.case, entry.stamp = UNUSABLE, GONE, "", []
        return names

    def forget(self, item: Item) -> dict[str, str]:
        """Drop an item's entries. Return cases that lose their last one, by content.

        A duplicate takes a case over.
        """
        dropped = self.entries.pop(frozenset(item.files), [])
        for entry in dropped:
            if entry.status == DUPLICATE:
                self._twins[entry.content].remove(entry)
        orphans = {}
        for entry in dropped:
            if entry.status != KEPT:
                continue
            del self.kept[entry.content]
            twins = self._twins.get(entry.content)
            if not twins:
                orphans[entry.content] = entry.case
            else:  # the same volume from elsewhere
                twin = twins.pop(0)
                twin.status, twin.reason, twin.case = KEPT, "", entry.case
                twin.normalization = entry.normalization  # that of the case
                self.kept[twin.content] = twin.case
        return orphans

    def holder(self, content: str) -> Entry:
        """Return the entry that has the case of a content."""
        return next(entry for entry in self.all() if entry.status == KEPT and entry.content == content)

    def resign(self, content: str, case: str) -> None:
        """Make the entry that has the case of a content a duplicate of another case."""
        entry = self.holder(content)
        entry.status, entry.reason, entry.case = DUPLICATE, f"same content as case {case}", ""
        self._twins.setdefault(content, []).append(entry)
        del self.kept[content]

    def all(self) -> list[Entry]:
        """Return all entries in the order of their items."""
        return [entry for entries in self.entries.values() for entry in entries]

    def counts(self) -> dict[str, int]:
        """Count entries by status."""
        statuses = [entry.status for entry in self.all()]
        return {status: statuses.count(status) for status in (KEPT, DUPLICATE, UNUSABLE, NO_IMAGE)}

    def write(self) -> None:
        """Write corpus.json."""
        rows = [asdict(entry) for entry in self.all()]
        head = {"version": VERSION, **self.head, "counts": self.counts(), "not_read": self.not_read}
        write_json({**head, "volumes": rows}, self.path)
