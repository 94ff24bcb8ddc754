"""The runs of a study: ordinary trainings in an nnUNet_preprocessed root of their own, a results root for each arm.

STUDY/study.json                    the protocol
STUDY/nnUNet_preprocessed/DATASET   links to the user's preprocessed data; plans and splits of our own
STUDY/results/ARM                   nnUNet_results of one arm
STUDY/init/ARM.pth                  a copy of the file behind --init
STUDY/cells/ARM/NAME.csv            the metrics of one run; its presence says that the run is done
STUDY/logs/ARM/NAME.txt             what its command printed
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.methods import SCHEMAS, TRAINERS
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.settings import PLANS_KEY, CommonSettings, split_sections
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.protocol import SCRATCH, TOTAL, Cases, Protocol

FINETUNER = "nnsslTrainer_Finetune"
#: What the study asks of every fine-tuning unless its overlays say otherwise.
FINETUNE = {
    "steps_per_epoch": 250,
    "validation_iterations": 1,
    "save_every": 1,
    "precision": "auto",
    "mirroring": False,
}
#: The fine-tuner's ways of sparing pretrained weights, switched off.
SPARE_NOTHING = {"head_only_steps": 0, "freeze_encoder_steps": 0, "encoder_lr_scale": 1.0}
#: Kinds of runs in the order in which they are wanted.
PRETRAINING, DEVELOPMENT, GRID = "pretraining", "development", "grid"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        arm: Whose.
        kind: ``PRETRAINING``, ``DEVELOPMENT`` or ``GRID``.
        fold: Its fold in the study's splits.
        rate: Fine-tuning rate; 0 for a pretraining.
        labels, subset: Of a grid cell; for a development run ``subset`` is its number.
    """

    arm: Arm
    kind: str
    fold: int
    rate: float = 0.0
    labels: int = 0
    subset: int = 0

    @property
    def name(self) -> str:
        if self.kind == PRETRAINING:
            return PRETRAINING
        if self.kind == DEVELOPMENT:
            return f"development_{self.subset}_rate_{self.rate:g}"
        return f"labels_{self.labels}_subset_{self.subset}"


@dataclass
class Grid:
    """All runs of a study and where they are."""

    folder: Path
    protocol: Protocol
    cases: Cases
    arms: list[Arm]
    device: str = "cpu"
    keep_checkpoints: bool = False
    finetuner: str = FINETUNER
    failed: dict[Cell, Path] = field(default_factory=dict)

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / self.protocol.dataset

    @cached_property
    def folds(self) -> list[dict[str, list[str]]]:
        """nnU-Net's splits: 0 pretrains, then the development runs, then the grid."""
        c = self.cases
        seen = sorted([*c.pool, *c.held_out]) if self.protocol.transductive else c.pool
        folds = [{"train": seen, "val": []}]
        folds += [{"train": train, "val": c.development} for train in c.development_subsets]
        return folds + [{"train": train, "val": c.held_out} for train in c.subsets.values()]

    def plans_name(self, cell: Cell) -> str:
        base = f"{self.protocol.plans}_study"
        if cell.kind == PRETRAINING:
            return base
        total = "_total" if cell.arm.name == TOTAL else "" if self.weights(cell.arm) or not self._gentle else "_scratch"
        return f"{base}{total}_rate_{cell.rate:g}"

    @property
    def _gentle(self) -> dict[str, float]:
        """The overlays' settings that spare pretrained weights: from scratch there is nothing to spare."""
        asked = self.plans.get(PLANS_KEY, {}).get("finetune", {})
        return {name: value for name, value in SPARE_NOTHING.items() if name in asked}

    @property
    def has_total(self) -> bool:
        """Whether scratch is also trained for equal total steps."""
        return any(arm.name == TOTAL for arm in self.arms)

    def pretrained_arms(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.method]

    def pretraining(self, arm: Arm) -> Cell:
        return Cell(arm, PRETRAINING, 0)

    def development(self, arm: Arm) -> list[Cell]:
        """The runs by which an arm's rate is chosen."""
        if arm.name == TOTAL:
            return []
        runs = range(len(self.cases.development_subsets))
        return [Cell(arm, DEVELOPMENT, 1 + run, rate, subset=run) for run in runs for rate in self.protocol.rates]

    def grid(self, arm: Arm, rate: float) -> list[Cell]:
        """An arm's runs that are compared."""
        first = 1 + len(self.cases.development_subsets)
        places = [
            (labels, subset, fold)
            for fold, (labels, subset) in enumerate(self.cases.subsets, first)
            if arm.name != TOTAL or (labels == self.protocol.primary_labels and subset < self.protocol.total_baseline)
        ]
        return [Cell(arm, GRID, fold, rate, labels, subset) for labels, subset, fold in places]

    def rate(self, arm: Arm) -> float:
        """The rate with the best mean Dice on development cases at the primary step; scratch's for both baselines."""
        chosen_by = next(a for a in self.arms if a.name == SCRATCH) if arm.name == TOTAL else arm
        used = self._rate_of_done(chosen_by)
        if used is not None:
            return used
        scores: dict[float, float] = {}
        for rate, cells in self._development_by_rate(chosen_by).items():
            if all(self.done(cell) for cell in cells):
                frames = [self.metrics(cell) for cell in cells]
                at_step = [frame[frame["step"] == self.protocol.primary_step] for frame in frames]
                score = sum(frame.groupby("organ")["dice"].mean().mean() for frame in at_step)
                if math.isfinite(score):  # it is not where no development case shows a class, nor a prediction does
                    scores[rate] = score
        return max(scores, key=lambda rate: scores[rate]) if scores else self.protocol.rates[0]

    def _development_by_rate(self, arm: Arm) -> dict[float, list[Cell]]:
        cells = self.development(arm)
        return {rate: [cell for cell in cells if cell.rate == rate] for rate in self.protocol.rates} if cells else {}

    def _rate_of_done(self, arm: Arm) -> float | None:
        """The rate of an arm's compared runs, if any is done: it never changes between them."""
        notes = (self.metrics_file(cell).with_suffix(".json") for cell in self.grid(arm, 0.0))
        return next((float(read_json(note)["rate"]) for note in notes if note.is_file()), None)

    def fold_folder(self, cell: Cell) -> Path:
        trainer = TRAINERS[cell.arm.method] if cell.kind == PRETRAINING else self.finetuner
        run = f"{trainer}__{self.plans_name(cell)}__{self.protocol.configuration}"
        return self.folder / "results" / cell.arm.name / self.protocol.dataset / run / f"fold_{cell.fold}"

    def metrics_file(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.arm.name / f"{cell.name}.csv"

    def log_file(self, cell: Cell) -> Path:
        return self.folder / "logs" / cell.arm.name / f"{cell.name}.txt"

    def failure_mark(self, cell: Cell) -> Path:
        """There while a run's last attempt failed."""
        return self.log_file(cell).with_suffix(".failed")

    def failures(self) -> dict[Cell, Path]:
        """Runs that failed, in this call or an earlier one, and were not done since; and their logs."""
        cells = (cell for cell in self.all_cells() if not self.done(cell) and self.failure_mark(cell).is_file())
        return {cell: self.log_file(cell) for cell in cells}

    def metrics(self, cell: Cell) -> pd.DataFrame:
        """Columns step, case, organ, dice, nsd of a run that is done."""
        return pd.read_csv(self.metrics_file(cell))

    def weights(self, arm: Arm) -> Path | None:
        """The file an arm is fine-tuned from."""
        if arm.init:
            return self.folder / "init" / f"{arm.name}.pth"  # a copy: the file may be another one tomorrow
        return self.fold_folder(self.pretraining(arm)) / "checkpoint_final.pth" if arm.method else None

    def done(self, cell: Cell) -> bool:
        if cell.kind == PRETRAINING:
            return (self.fold_folder(cell) / "pretraining_summary.json").is_file()
        return self.metrics_file(cell).is_file()

    def ready(self) -> Iterator[Cell]:
        """Runs that are not done and whose conditions are met, the most wanted first."""
        for arm in self.pretrained_arms():
            if not self.done(self.pretraining(arm)):
                yield self.pretraining(arm)
        usable = [arm for arm in self.arms if not arm.method or self.done(self.pretraining(arm))]
        for arm in usable:
            yield from (cell for cell in self.development(arm) if not self.done(cell))
        cells = [cell for arm in usable if self.rate_is_known(arm) for cell in self.grid(arm, self.rate(arm))]
        p = self.protocol
        # pairs are completed one after the other, the primary endpoint's first, the long baseline last
        cells.sort(key=lambda c: (c.arm.name == TOTAL, c.labels != p.primary_labels, c.labels, c.subset))
        yield from (cell for cell in cells if not self.done(cell))

    def rate_is_known(self, arm: Arm) -> bool:
        """Whether every development run is done, but for those of a rate of which one failed; one rate must be left."""
        arm = self.arms[0] if arm.name == TOTAL else arm
        by_rate = self._development_by_rate(arm)
        if not by_rate or self._rate_of_done(arm) is not None:
            return True
        complete = [all(self.done(cell) for cell in cells) for cells in by_rate.values()]
        failed = [any(cell in self.failed for cell in cells) for cells in by_rate.values()]
        return any(complete) and all(a or b for a, b in zip(complete, failed, strict=True))

    def all_cells(self) -> list[Cell]:
        """Every run, done or not; grid cells of arms whose rate is still unknown with the first rate."""
        cells = [self.pretraining(arm) for arm in self.pretrained_arms()]
        for arm in self.arms:
            cells += self.development(arm)
            cells += self.grid(arm, self.rate(arm) if self.rate_is_known(arm) else self.protocol.rates[0])
        return cells

    @cached_property
    def plans(self) -> dict:
        """The study's plans, as ``Study.prepare`` wrote them."""
        return read_json(self.preprocessed / f"{self.protocol.plans}_study.json")

    @cached_property
    def reader(self) -> BaseReaderWriter:
        """What reads the data set's label maps."""
        return PlansManager(self.plans).image_reader_writer_class()

    @cached_property
    def common(self) -> CommonSettings:
        """Their settings for every pretraining."""
        return split_sections(self.plans.get(PLANS_KEY, {}), SCHEMAS, "the study's plans")[0]

    def pretraining_steps(self) -> int:
        return self.common.epochs * self.common.iterations_per_epoch

    def total_steps(self) -> int:
        """Fine-tuning steps and a pretraining's."""
        return self.protocol.steps + self.pretraining_steps()

    def last_step(self, cell: Cell) -> int:
        """The step at which a fine-tuning ends."""
        return self.total_steps() if cell.arm.name == TOTAL else self.protocol.steps

    def write_plans(self, cell: Cell) -> None:
        """Write the plans of a fine-tuning: the study's own with the run's length, snapshots and rate."""
        name, p = self.plans_name(cell), self.protocol
        if cell.kind == PRETRAINING:
            return
        section, last = self.plans.get(PLANS_KEY, {}), self.last_step(cell)
        snapshots = [last] if cell.arm.name == TOTAL else p.snapshots
        own = {"steps": last, "snapshots": snapshots, "learning_rate": cell.rate, "seed": p.seed}
        if not self.weights(cell.arm):
            own |= self._gentle
        section = {**section, "finetune": {**FINETUNE, **section.get("finetune", {}), **own}}
        write_json({**self.plans, "plans_name": name, PLANS_KEY: section}, self.preprocessed / f"{name}.json")

    def command(self, cell: Cell) -> list[str]:
        """The run's command; it goes on where an interrupted one stopped."""
        trainer = TRAINERS[cell.arm.method] if cell.kind == PRETRAINING else self.finetuner
        p = self.protocol
        words = ["nnUNetv2_train", p.dataset, p.configuration, str(cell.fold), "-tr", trainer]
        words += ["-p", self.plans_name(cell), "-device", self.device]
        kept = self.fold_folder(cell)
        if any((kept / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best")):
            return [*words, "--c"]
        weights = self.weights(cell.arm) if cell.kind != PRETRAINING else None
        return [*words, "-pretrained_weights", str(weights)] if weights else words

    def shown_command(self, cell: Cell) -> str:
        """The command of a run from its start, with its results root, for the report."""
        weights = self.weights(cell.arm) if cell.kind != PRETRAINING else None
        words = [word for word in self.command(cell) if word != "--c"]
        if weights and "-pretrained_weights" not in words:
            words += ["-pretrained_weights", str(weights)]
        line = f"nnUNet_results={self.folder / 'results' / cell.arm.name} {shlex.join(words)}"
        return line.replace(str(self.folder), "$STUDY")
