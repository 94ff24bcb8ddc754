"""Define a study's runs and their files.

They are ordinary trainings in an nnUNet_preprocessed root of their own::

STUDY/study.json                    protocol
STUDY/nnUNet_preprocessed/DATASET   links to the user's preprocessed data, plans and splits of the study
STUDY/results/ARM                   nnUNet_results of one arm
STUDY/init/ARM.pth                  copy of the file behind --init
STUDY/runs/ARM/NAME.csv             metrics of one run, present once the run is done
STUDY/logs/ARM/NAME.txt             output of the run's command
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
from nnssl_ext.settings import PLANS_KEY, UNPROTECTED, CommonSettings, split_sections
from nnssl_ext.study.arms import RESERVED, Arm
from nnssl_ext.study.metrics import run_scores
from nnssl_ext.study.protocol import SCRATCH, TOTAL, Cases, Protocol

FINETUNER = "nnsslTrainer_Finetune"
#: Fine-tuning settings of a study unless its overlays set them.
FINETUNE = {
    "steps_per_epoch": 250,
    "validation_iterations": 1,
    "save_every": 1,
    "precision": "auto",
    "mirroring": False,
}
#: Kinds of runs in the order in which they are started.
PRETRAINING, DEVELOPMENT, COMPARISON = "pretraining", "development", "comparison"


@dataclass(frozen=True)
class Run:
    """Describe one training.

    Attributes:
        arm: The run's arm.
        kind: ``PRETRAINING``, ``DEVELOPMENT`` or ``COMPARISON``.
        fold: Fold in the study's splits.
        rate: Fine-tuning rate. 0 for a pretraining.
        labels: Budget of a compared run.
        subset: Label subset of a compared run, else the number of the run.
    """

    arm: Arm
    kind: str
    fold: int
    rate: float = 0.0
    labels: int = 0
    subset: int = 0

    @property
    def name(self) -> str:
        """Return the stem of the run's files."""
        if self.kind == PRETRAINING:
            return PRETRAINING + (f"_seed_{self.subset}" if self.subset else "")
        if self.kind == DEVELOPMENT:
            return f"development_{self.subset}_rate_{self.rate:.12g}"
        return f"labels_{self.labels}_subset_{self.subset}"


@dataclass
class Grid:
    """List all runs of a study and their files."""

    folder: Path
    protocol: Protocol
    cases: Cases
    arms: list[Arm]
    device: str = "cpu"
    keep_checkpoints: bool = False
    finetuner: str = FINETUNER
    failed: dict[Run, Path] = field(default_factory=dict)

    @property
    def preprocessed(self) -> Path:
        """Return the study's own folder of the preprocessed target."""
        return self.folder / "nnUNet_preprocessed" / self.protocol.dataset

    @property
    def pretraining_dataset(self) -> str:
        """Return the data set that pretrainings run on."""
        return self.protocol.pretrain_on or self.protocol.dataset

    @cached_property
    def folds(self) -> list[dict[str, list[str]]]:
        """Return nnU-Net's splits: pretraining, development, comparison."""
        c = self.cases
        seen = sorted([*c.pool, *c.held_out]) if self.protocol.transductive else c.pool
        folds = [{"train": seen, "val": []}]
        folds += [{"train": train, "val": c.development} for train in c.development_subsets]
        return folds + [{"train": train, "val": c.held_out} for train in c.subsets.values()]

    @property
    def pretraining_cases(self) -> list[str]:
        """Return the cases whose images pretraining sees."""
        if not self.protocol.pretrain_on:
            return self.folds[0]["train"]
        splits = self.preprocessed.parent / self.protocol.pretrain_on / "splits_final.json"
        return read_json(splits, list)[0]["train"]

    @cached_property
    def file_ending(self) -> str:
        """Return the ending of the data set's files."""
        return read_json(self.preprocessed / "dataset.json")["file_ending"]

    def case_of(self, file: str) -> str:
        """Return the case of a predicted file, as the table of results names it."""
        return file.removesuffix(self.file_ending)

    def plans_name(self, run: Run) -> str:
        """Return the name of a run's plans."""
        base = f"{self.protocol.plans}_study"
        if run.kind == PRETRAINING:
            return base + (f"_seed_{run.subset}" if run.subset else "")
        kind = ""
        if run.arm.name == TOTAL:
            kind = f"_{RESERVED}"
        elif run.arm.finetune:
            kind = f"_{run.arm.name.rpartition('+')[2]}"
        elif self._protection and not self.is_pretrained(run.arm):
            kind = "_scratch"
        return f"{base}{kind}_rate_{run.rate:.12g}"

    @staticmethod
    def is_pretrained(arm: Arm) -> bool:
        """Return whether an arm starts from pretrained weights."""
        return bool(arm.method or arm.init)

    @property
    def _protection(self) -> dict[str, float]:
        """Return the protecting settings, switched off for scratch."""
        asked = self.plans.get(PLANS_KEY, {}).get("finetune", {})
        return {name: value for name, value in UNPROTECTED.items() if name in asked}

    @property
    def has_total(self) -> bool:
        """Return whether scratch also has equal total steps."""
        return any(arm.name == TOTAL for arm in self.arms)

    def pretrainings(self) -> list[Run]:
        """List every pretraining once. Arms that differ in their recipe share theirs."""
        runs = [
            self.pretraining(arm, seed)
            for arm in self.arms
            if arm.method
            for seed in range(self.protocol.pretraining_seeds)
        ]
        return list(dict.fromkeys(runs))

    def pretraining(self, arm: Arm, subset: int = 0) -> Run:
        """Return the pretraining behind an arm's run."""
        own = Arm(arm.weights_name, method=arm.method)
        return Run(own, PRETRAINING, 0, subset=subset % self.protocol.pretraining_seeds)

    def is_ready(self, run: Run) -> bool:
        """Return whether a fine-tuning's weights exist."""
        return not run.arm.method or self.done(self.pretraining(run.arm, run.subset))

    def rates(self, arm: Arm) -> list[float]:
        """Return the learning rates that an arm chooses from."""
        return self.protocol.rates if arm.own_rate is None else [arm.own_rate]

    def development(self, arm: Arm) -> list[Run]:
        """List the runs that choose an arm's rate."""
        if arm.name == TOTAL or len(self.rates(arm)) == 1:
            return []
        runs = range(len(self.cases.development_subsets))
        return [Run(arm, DEVELOPMENT, 1 + run, rate, subset=run) for run in runs for rate in self.rates(arm)]

    def compared(self, arm: Arm, rate: float) -> list[Run]:
        """List an arm's runs that are compared."""
        first = 1 + len(self.cases.development_subsets)
        places = [
            (labels, subset, fold)
            for fold, (labels, subset) in enumerate(self.cases.subsets, first)
            if arm.name != TOTAL or (labels == self.protocol.primary_labels and subset < self.protocol.total_baseline)
        ]
        return [Run(arm, COMPARISON, fold, rate, labels, subset) for labels, subset, fold in places]

    def rate(self, arm: Arm) -> float:
        """Return the rate with the best Dice on development cases. Both baselines take the rate of scratch."""
        chosen_by = next(a for a in self.arms if a.name == SCRATCH) if arm.name == TOTAL else arm
        used = self._rate_of_done(chosen_by)
        if used is not None:
            return used
        scores = self.scores_of_rates(chosen_by)
        return max(scores, key=lambda rate: scores[rate]) if scores else self.rates(chosen_by)[0]

    def scores_of_rates(self, arm: Arm) -> dict[float, float]:
        """Return the sum of Dice over the development runs of each rate that has a score."""
        scores: dict[float, float] = {}
        for rate, runs in self._development_by_rate(arm).items():
            if all(self.done(run) for run in runs):
                frames = [self.metrics(run) for run in runs]
                at_step = [frame[frame["step"] == self.protocol.primary_step] for frame in frames]
                score = sum(self.score(frame, "dice", ["step"]).mean() for frame in at_step)
                if math.isfinite(score):  # NaN where neither a development case nor a prediction shows a class
                    scores[rate] = score
        return scores

    def score(self, frame: pd.DataFrame, value: str, by: list[str]) -> pd.Series:
        """Score runs by the primary class or all classes."""
        name = self.protocol.primary_class
        return run_scores(frame[frame["organ"] == name] if name else frame, value, by)

    def _development_by_rate(self, arm: Arm) -> dict[float, list[Run]]:
        runs = self.development(arm)
        return {rate: [run for run in runs if run.rate == rate] for rate in self.rates(arm)} if runs else {}

    def _rate_of_done(self, arm: Arm) -> float | None:
        """Return the rate of an arm's finished runs. It never changes between them."""
        notes = (self.metrics_file(run).with_suffix(".json") for run in self.compared(arm, 0.0))
        return next((float(read_json(note)["rate"]) for note in notes if note.is_file()), None)

    def fold_folder(self, run: Run) -> Path:
        """Return nnU-Net's output folder of a run."""
        trainer, dataset = self._trainer(run), self._dataset(run)
        name = f"{trainer}__{self.plans_name(run)}__{self.protocol.configuration}"
        return self.folder / "results" / run.arm.name / dataset / name / f"fold_{run.fold}"

    def _trainer(self, run: Run) -> str:
        return TRAINERS[run.arm.method] if run.kind == PRETRAINING else self.finetuner

    def _dataset(self, run: Run) -> str:
        return self.pretraining_dataset if run.kind == PRETRAINING else self.protocol.dataset

    def metrics_file(self, run: Run) -> Path:
        """Return the file that holds a run's metrics."""
        return self.folder / "runs" / run.arm.name / f"{run.name}.csv"

    def log_file(self, run: Run) -> Path:
        """Return the file with a run's output."""
        return self.folder / "logs" / run.arm.name / f"{run.name}.txt"

    def failure_mark(self, run: Run) -> Path:
        """Return the mark of a run's failed last attempt."""
        return self.log_file(run).with_suffix(".failed")

    def failures(self) -> dict[Run, Path]:
        """Return failed runs with their logs."""
        runs = (run for run in self.all_runs() if not self.done(run) and self.failure_mark(run).is_file())
        return {run: self.log_file(run) for run in runs}

    def metrics(self, run: Run) -> pd.DataFrame:
        """Read a run's metrics: step, case, organ, dice, nsd."""
        # labels may have names like 1 and NA
        missing = {"dice": [""], "nsd": [""]}
        types = {"case": str, "organ": str}
        return pd.read_csv(self.metrics_file(run), dtype=types, keep_default_na=False, na_values=missing)

    def weights(self, run: Run) -> Path | None:
        """Return a fine-tuning's weights, None for scratch."""
        if run.arm.init:
            return self.folder / "init" / f"{run.arm.weights_name}.pth"  # a copy, since the file may change
        if not run.arm.method:
            return None
        return self.fold_folder(self.pretraining(run.arm, run.subset)) / "checkpoint_final.pth"

    def done(self, run: Run) -> bool:
        """Return whether a run is finished and measured. Weights that are still needed must be there."""
        if run.kind != PRETRAINING:
            return self.metrics_file(run).is_file()
        folder = self.fold_folder(run)
        if not (folder / "pretraining_summary.json").is_file():
            return False
        return (folder / "checkpoint_final.pth").is_file() or all(map(self.done, self._started_from(run)))

    def _started_from(self, pretraining: Run) -> Iterator[Run]:
        """Yield the fine-tunings of a pretraining's weights."""
        for arm in self.arms:
            if arm.method:
                for run in self.development(arm) + self.compared(arm, 0.0):
                    if self.pretraining(arm, run.subset) == pretraining:
                        yield run

    def ready(self) -> Iterator[Run]:
        """Yield unfinished runs that can start, most urgent first."""
        yield from (run for run in self.pretrainings() if not self.done(run))
        for arm in self.arms:
            yield from (run for run in self.development(arm) if not self.done(run) and self.is_ready(run))
        runs = [run for arm in self.arms if self.rate_is_known(arm) for run in self.compared(arm, self.rate(arm))]
        p = self.protocol
        # complete one pair after the other, the endpoint's budget first, the long baseline last
        runs.sort(key=lambda r: (r.arm.name == TOTAL, r.labels != p.primary_labels, r.labels, r.subset))
        yield from (run for run in runs if not self.done(run) and self.is_ready(run))

    def rate_is_known(self, arm: Arm) -> bool:
        """Return whether an arm's rate can be chosen. Rates with a failed run are excluded."""
        arm = next(a for a in self.arms if a.name == SCRATCH) if arm.name == TOTAL else arm
        by_rate = self._development_by_rate(arm)
        if not by_rate or self._rate_of_done(arm) is not None:
            return True
        complete = [all(self.done(run) for run in runs) for runs in by_rate.values()]
        failed = [any(run in self.failed for run in runs) for runs in by_rate.values()]
        return any(complete) and all(a or b for a, b in zip(complete, failed, strict=True))

    def all_runs(self) -> list[Run]:
        """List every run. Arms with an unknown rate take the first."""
        runs = self.pretrainings()
        for arm in self.arms:
            runs += self.development(arm)
            runs += self.compared(arm, self.rate(arm) if self.rate_is_known(arm) else self.rates(arm)[0])
        return runs

    @cached_property
    def plans(self) -> dict:
        """Return the study's plans, as ``Study.prepare`` wrote them."""
        return read_json(self.preprocessed / f"{self.protocol.plans}_study.json")

    @cached_property
    def reader(self) -> BaseReaderWriter:
        """Return nnU-Net's reader of the data set's label maps."""
        return PlansManager(self.plans).image_reader_writer_class()

    @cached_property
    def common(self) -> CommonSettings:
        """Return the settings that every pretraining shares."""
        return split_sections(self.plans.get(PLANS_KEY, {}), SCHEMAS, "the study's plans")[0]

    def pretraining_steps(self) -> int:
        """Return the steps of a pretraining."""
        return self.common.epochs * self.common.iterations_per_epoch

    def total_steps(self) -> int:
        """Return the steps of pretraining and fine-tuning together."""
        return self.protocol.steps + self.pretraining_steps()

    def last_step(self, run: Run) -> int:
        """Return the step at which a fine-tuning ends."""
        return self.total_steps() if run.arm.name == TOTAL else self.protocol.steps

    def snapshots(self, run: Run) -> list[int]:
        """Return the steps after which a fine-tuning is measured."""
        return [self.last_step(run)] if run.arm.name == TOTAL else self.protocol.snapshots

    def finetune_settings(self, run: Run) -> dict:
        """Return a fine-tuning's settings but those of the protocol."""
        return {**FINETUNE, **self.plans.get(PLANS_KEY, {}).get("finetune", {}), **run.arm.finetune}

    def write_plans(self, run: Run) -> None:
        """Write a run's plans with its own settings."""
        name, p = self.plans_name(run), self.protocol
        section = self.plans.get(PLANS_KEY, {})
        if run.kind == PRETRAINING:
            if run.subset or p.pretrain_on:
                own = {**section, "seed": p.seed + run.subset}
                self._write(own, name, self.preprocessed.parent / self.pretraining_dataset)
            return
        last = self.last_step(run)
        own = {"steps": last, "snapshots": self.snapshots(run), "learning_rate": run.rate, "seed": p.seed}
        if not self.is_pretrained(run.arm):
            own |= {name: value for name, value in UNPROTECTED.items() if name in run.arm.finetune} | self._protection
        self._write({**section, "finetune": {**self.finetune_settings(run), **own}}, name, self.preprocessed)

    def _write(self, section: dict, name: str, folder: Path) -> None:
        own = {"plans_name": name, "dataset_name": folder.name, PLANS_KEY: section}
        write_json({**self.plans, **own}, folder / f"{name}.json")

    def command(self, run: Run) -> list[str]:
        """Return a run's command. It continues an interrupted run."""
        words = ["nnUNetv2_train", self._dataset(run), self.protocol.configuration, str(run.fold)]
        words += ["-tr", self._trainer(run), "-p", self.plans_name(run), "-device", self.device]
        kept = self.fold_folder(run)
        if any((kept / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best")):
            return [*words, "--c"]
        weights = self.weights(run) if run.kind != PRETRAINING else None
        return [*words, "-pretrained_weights", str(weights)] if weights else words

    def shown_command(self, run: Run) -> str:
        """Return a run's command from its start."""
        weights = self.weights(run) if run.kind != PRETRAINING else None
        words = [word for word in self.command(run) if word != "--c"]
        if weights and "-pretrained_weights" not in words:
            words += ["-pretrained_weights", str(weights)]
        folder = str(self.folder)
        shown = [f'"{word.replace(folder, "$STUDY")}"' if folder in word else shlex.quote(word) for word in words]
        return f'nnUNet_results="$STUDY/results/{run.arm.name}" {" ".join(shown)}'
