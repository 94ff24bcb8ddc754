"""Make a pretraining data set from unlabeled images.

    nnssl_ext corpus -d 801 -n OpenBrain --like 4 SOURCE...

A source is an nnU-Net raw data set (a folder, or its name or number in nnUNet_raw), a Decathlon task's folder, or a
folder of NIfTI, Analyze, MGH, NRRD, MetaImage or DICOM files. Called again, it adds new files. Then

    nnUNetv2_train 801 3d_fullres all -tr nnsslTrainer_VolumeFusion

pretrains, and the checkpoint fits data set 4. corpus.json lists every volume, kept or not, and why.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.commands import RunName, same_number
from nnssl_ext.errors import UserError
from nnssl_ext.signals import EndSignals

if TYPE_CHECKING:
    from nnssl_ext.data.corpus.corpus import Corpus
    from nnssl_ext.data.corpus.manifest import Entry, Manifest
    from nnssl_ext.data.corpus.sources import NotRead

#: Damaged volumes that are named at the end; corpus.json names all.
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="where the images are")
    add("-d", required=True, type=int, metavar="NUMBER", help="number of the corpus")
    add("-n", required=True, metavar="NAME", help="name of the corpus")
    add("--like", required=True, metavar="DATASET", help="the target (name or ID), planned and preprocessed")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="of the target's plans (3d_fullres)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the target's plans (nnUNetPlans)")
    add(
        "--channels",
        action="append",
        default=[],
        metavar="NAMES",
        help="A,B or SOURCE=A,B: take these; may be repeated",
    )
    add("--normalization", action="append", default=[], metavar="SOURCE=SCHEME", help="not the plan's; may be repeated")
    add("--max-failures", type=float, default=5.0, metavar="PERCENT", help="damaged volumes that are accepted (5)")
    add("--retry", action="store_true", help="read again what an earlier call could not use")
    add("-np", type=int, default=None, metavar="N", help="processes (nnU-Net's default, at most one per core)")


def run(arguments: argparse.Namespace) -> None:
    from nnunetv2.configuration import default_num_processes

    from nnssl_ext.data.corpus.corpus import Corpus
    from nnssl_ext.data.corpus.sources import Wishes, items_of, unused_words
    from nnssl_ext.environment import cores, dataset_folder

    if not 0 <= arguments.max_failures <= 100:
        raise UserError(f"--max-failures: expected 0 to 100, got {arguments.max_failures:g}")
    if arguments.np is not None and arguments.np < 1:
        raise UserError(f"-np: expected at least 1, got {arguments.np}")
    processes = arguments.np or max(1, min(default_num_processes, cores()))
    like = dataset_folder(arguments.like)
    folder = _folder(arguments.d, arguments.n, like)
    corpus = Corpus(folder, like, arguments.p, arguments.c, processes)
    chosen = _choices("--channels", arguments.channels)
    channels = {source: tuple(name.strip() for name in names.split(",")) for source, names in chosen}
    schemes = dict(_choices("--normalization", arguments.normalization))
    for source, scheme in schemes.items():
        _check_scheme(source, scheme)
    wishes = Wishes(corpus.channels, channels, schemes)
    unused_words(wishes, arguments.sources)
    not_read: dict[str, NotRead] = {source: {} for source in arguments.sources}
    signals = EndSignals(at_once=True)
    try:
        with signals:
            found = [item for source in arguments.sources for item in items_of(source, wishes, not_read[source])]
            items = {frozenset(item.files): item for item in found}
            manifest = corpus.add(list(items.values()), arguments.max_failures, arguments.retry, not_read)
    except KeyboardInterrupt:
        kept = corpus.manifest().counts()["kept"] if corpus.folder.is_dir() else 0
        print(
            f"Stopped by {signals.received}: {kept} volumes are in {corpus.folder.name}, none is lost. "
            "Call the same command again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(128 + getattr(signal, signals.received)) from None
    except UserError:
        if corpus.folder.is_dir():
            _list_passed_by(corpus.manifest(), not_read)
            _note_foreign(corpus, corpus.manifest())
        raise
    _report(corpus, manifest, not_read)


def _folder(number: int, name: str, like: Path) -> Path:
    """Name the corpus's folder.

    Raises:
        UserError: If another data set has its number.
    """
    if not 1 <= number <= 9999 or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or "__" in name:
        raise UserError(f"-d takes 1 to 9999 and -n letters, digits and hyphens, got {number} and '{name}'")
    folder = like.parent / f"Dataset{number:03d}_{name}"
    others = same_number(folder.name)
    if others or folder == like:
        raise UserError(f"data set number {number} is taken by {', '.join(others) or like.name}. Give another -d")
    return folder


def _choices(option: str, words: list[str]) -> list[tuple[str, str]]:
    """Split ``SOURCE=VALUE`` at the last sign. Without a source the value is for all."""
    found = []
    for word in words:
        source, _, value = word.rpartition("=")
        if not value or (not source and option != "--channels"):
            raise UserError(f"{option} takes SOURCE=VALUE, got '{word}'")
        found.append((source, value))
    return found


def _check_scheme(source: str, scheme: str) -> None:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
        channel_name_to_normalization_mapping,
    )

    known = sorted({entry.__name__ for entry in channel_name_to_normalization_mapping.values()})
    if scheme not in known:
        raise UserError(f"--normalization {source}={scheme}: unknown scheme. Known: {', '.join(known)}")


def _report(corpus: Corpus, manifest: Manifest, not_read: dict[str, NotRead]) -> None:
    from nnssl_ext.data.corpus.manifest import UNUSABLE

    unusable = [entry for entry in manifest.all() if entry.status == UNUSABLE]
    for entry in unusable[:SHOWN]:
        print(f"left out: {entry}", file=sys.stderr)
    if len(unusable) > SHOWN:
        print(f"left out: {len(unusable) - SHOWN} more, see {manifest.path}", file=sys.stderr)
    _list_passed_by(manifest, not_read)
    remarked = [entry for entry in manifest.all() if entry.case and entry.remarks]
    for entry in remarked[:SHOWN]:
        print(f"note: {entry.files[0]}: {', '.join(entry.remarks)}", file=sys.stderr)
    if len(remarked) > SHOWN:
        print(f"note: {len(remarked) - SHOWN} more have remarks, see {manifest.path}", file=sys.stderr)
    _note_foreign(corpus, manifest)
    _note_own(corpus, manifest)
    counts = ", ".join(f"{number} {status}" for status, number in manifest.counts().items() if number)
    print(f"{corpus.folder}: {counts}")
    if (corpus.folder / "splits_final.json").is_file():
        print("note: new cases are not in splits_final.json; fold all takes every case", file=sys.stderr)
    trainer = "nnsslTrainer_VolumeFusion"
    command = RunName(corpus.folder.name, corpus.configuration, "all", corpus.plans, trainer).command()
    print(f"pretrain with: {command}")


def _list_passed_by(manifest: Manifest, not_read: dict[str, NotRead]) -> None:
    """Count unread files and files without a 3-D image."""
    from nnssl_ext.data.corpus.manifest import NO_IMAGE

    kinds: dict[str, list[str]] = {}
    for entry in manifest.all():
        if entry.status == NO_IMAGE:
            kinds.setdefault(entry.kind, []).append(str(entry))
    for kind, names in sorted(kinds.items()):
        print(f"passed by: {len(names)} x {kind}, as {names[0]}", file=sys.stderr)
    others: dict[str, list[str]] = {}
    for found in not_read.values():
        for kind, names in found.items():
            others.setdefault(kind, []).extend(names)
    for kind, names in sorted(others.items()):
        print(f"not read: {len(names)} x {kind}, as {names[0]}", file=sys.stderr)


def _note_foreign(corpus: Corpus, manifest: Manifest) -> None:
    """Suggest another normalization for images other than CT."""
    from nnssl_ext.data.corpus.preparation import CONSTANT

    ct = [number for number, scheme in enumerate(corpus.normalization) if scheme == "CTNormalization"]

    def foreign_names(entry: Entry) -> set[str]:
        # the names of the channels that are normalized as CT; those of one volume may be unknown
        names = [entry.channels[n] for n in ct if n < len(entry.channels)]
        return {name.casefold() for name in (*names, entry.modality)} - {"", "ct"}

    foreign = {
        entry.source
        for entry in manifest.all()
        if ct and not entry.normalization and ((entry.case and foreign_names(entry)) or entry.reason == CONSTANT)
    }
    for source in sorted(foreign):
        print(
            f"note: {source} does not look like CT, the plan normalizes as CT; "
            f"--normalization '{source}=ZScoreNormalization'?",
            file=sys.stderr,
        )


def _note_own(corpus: Corpus, manifest: Manifest) -> None:
    """Warn of validation images within the corpus."""
    own = (Path(os.environ.get("nnUNet_raw", "")) / corpus.like.name / "imagesTr").resolve()
    folders = {os.path.dirname(file) for entry in manifest.all() for file in entry.files}
    if any(Path(folder).resolve() == own for folder in folders):
        print(
            f"note: {corpus.like.name}'s own training images are in the corpus, its validation cases among them: their "
            "Dice after this pretraining is too good",
            file=sys.stderr,
        )
