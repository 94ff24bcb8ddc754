"""corpus.json: every volume that a corpus was offered, and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json

KEPT, DUPLICATE, UNUSABLE, NO_IMAGE = "kept", "duplicate", "unusable", "no image"
#: Raised when what the manifest says changes its meaning.
VERSION = 1


@dataclass
class Entry:
    """One case that was made, or a volume that was not.

    Attributes:
        source: As named on the command line.
        files: Absolute paths: one file, one per channel, or a DICOM folder.
        stamp: Number, bytes and latest change of the files when they were read.
        status: kept, duplicate, unusable, or no image.
        reason: Why it was left out.
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
    """

    source: str
    files: list[str]
    stamp: list[int]
    status: str = UNUSABLE
    reason: str = ""
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

    def __str__(self) -> str:
        return f"{self.files[0]}: {self.reason}"


class Manifest:
    """The entries of a corpus; see ``Entry``.

    Args:
        path: Of corpus.json.
        head: What all entries share: the target and its preprocessing.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.entries: dict[tuple[str, ...], list[Entry]] = {}
        self._kept: dict[str, str] = {}
        self._twins: dict[str, list[Entry]] = {}

    @classmethod
    def load(cls, path: Path, head: dict[str, Any]) -> Manifest:
        """The manifest of a corpus, empty if there is none yet.

        Raises:
            UserError: If it is of another target or another version.
        """
        manifest = cls(path, head)
        if not path.is_file():
            return manifest
        content = read_json(path)
        stored = {key: value for key, value in content.items() if key not in ("volumes", "counts")}
        for key in sorted({*head, *stored}):
            if stored.get(key) != head.get(key):
                raise UserError(
                    f"{path} was made with another {key}; a corpus has one target and one preprocessing: give "
                    f"another -d and -n, or remove {path.parent}"
                )
        names = {entry.name for entry in fields(Entry)}
        for row in content.get("volumes", []):
            if set(row) != names:
                raise UserError(f"{path} is no manifest of this version; remove {path.parent} and make it again")
            manifest.add(Entry(**row))
        return manifest

    def add(self, entry: Entry) -> None:
        """Take an entry over."""
        self.entries.setdefault(tuple(entry.files), []).append(entry)
        if entry.status == KEPT:
            self._kept[entry.content] = entry.case
        elif entry.status == DUPLICATE:
            self._twins.setdefault(entry.content, []).append(entry)

    def case_of(self, content: str) -> str:
        """The case that has this content; empty if there is none."""
        return self._kept.get(content, "")

    def contents(self) -> list[str]:
        """Of all cases."""
        return list(self._kept)

    def cases(self) -> set[str]:
        """Identifiers of all cases."""
        return set(self._kept.values())

    def knows(self, item: Item, cases: set[str], retry: bool = False) -> bool:
        """Whether an item was read as it is now, and what was made of it is there.

        Args:
            item: Any.
            cases: That are there.
            retry: What was of no use counts as not read.
        """
        found = self.entries.get(item.files, [])
        read = {name for entry in found for name in entry.channels}
        if not found or read != set(item.channels()):
            return False
        stamp = item.stamp()
        return all(
            entry.stamp == stamp
            and entry.normalization == item.normalization
            and (entry.status != KEPT or entry.case in cases)
            and not (retry and entry.status == UNUSABLE)
            for entry in found
        )

    def forget(self, item: Item) -> list[str]:
        """Drop an item's entries; returns the cases that nothing stands behind any more."""
        dropped = self.entries.pop(item.files, [])
        for entry in dropped:
            if entry.status == DUPLICATE:
                self._twins[entry.content].remove(entry)
        orphans = []
        for entry in dropped:
            if entry.status != KEPT:
                continue
            del self._kept[entry.content]
            twins = self._twins.get(entry.content)
            if not twins:
                orphans.append(entry.case)
            else:  # the same volume from elsewhere
                twin = twins.pop(0)
                twin.status, twin.reason, twin.case = KEPT, "", entry.case
                self._kept[twin.content] = twin.case
        return orphans

    def all(self) -> list[Entry]:
        return [entry for entries in self.entries.values() for entry in entries]

    def counts(self) -> dict[str, int]:
        statuses = [entry.status for entry in self.all()]
        return {status: statuses.count(status) for status in (KEPT, DUPLICATE, UNUSABLE, NO_IMAGE)}

    def write(self) -> None:
        rows = [asdict(entry) for entry in self.all()]
        write_json({**self.head, "counts": self.counts(), "volumes": rows}, self.path)
