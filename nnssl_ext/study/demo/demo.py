"""Fine-tune with and without pretraining, by stock commands.

Everything lies in one folder: an nnUNet_raw and nnUNet_preprocessed of its own, one results folder per arm (arms that
share trainer, plans and fold would overwrite each other), logs, and the page.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nnssl_ext.commands import dataset_number
from nnssl_ext.environment import cores
from nnssl_ext.errors import UserError
from nnssl_ext.files import lock_file
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.recipe import derive_plans, load_recipe, read_json, recipes_of, write_json
from nnssl_ext.resources import resource_folder
from nnssl_ext.settings import CommonSettings
from nnssl_ext.study.demo.chain import Chain, Step
from nnssl_ext.study.demo.sources import Source

METHOD, PLANS, CONFIGURATION = "volume_fusion", "nnUNetPlans_demo", "3d_fullres"
#: Folds of the sources' splits.
FINETUNING_FOLD, PRETRAINING_FOLD = "0", "1"
#: Stock trainers of both arms, for fast and slow machines.
LONG, SHORT = "nnUNetTrainer_5epochs", "nnUNetTrainer_1epoch"
#: Training and validation steps of a stock epoch, the latter without a backward pass.
STOCK_STEPS, STOCK_VALIDATION = 250, 50
#: Seconds for planning, starts and predictions, and a step of a training against its bare network.
FIXED_SECONDS, STEP_OVERHEAD = 100.0, 1.5
#: Shortest pretraining that is worth showing, in steps.
MIN_STEPS = 200
#: Patch limit for slow machines, and the share of a step that it costs.
SMALL_PATCH, SMALL_SHARE = 16, 0.4


@dataclass(frozen=True)
class Lengths:
    """Lengths of the trainings.

    Attributes:
        pretraining_epochs: Epochs of the pretraining.
        finetuner: Stock trainer of both arms.
        patch_limit: Longest patch edge, 0 for the recipe's.
        seconds_per_step: Measured time of a step of the network, 0 if it was not measured.
    """

    pretraining_epochs: int
    finetuner: str
    patch_limit: int = 0
    seconds_per_step: float = 0.0

    @property
    def finetuning_epochs(self) -> int:
        """Return the epochs of the fine-tuner, from its name."""
        return int("".join(character for character in self.finetuner if character.isdigit()) or 1000)

    @property
    def caution(self) -> str:
        """Return what a reader must know of shortened trainings, '' if they have their length."""
        if not self.patch_limit:
            return ""
        return (
            f"This machine was too slow or too busy for the time: a step took {self.seconds_per_step:.1f} s. Crops and "
            f"trainings are so short that their Dice means nothing. Give more --minutes, with nothing else running."
        )


def choose_lengths(seconds: float, minutes: float, epochs: int, steps: int) -> Lengths:
    """Choose lengths that fit the time, the longest first.

    Args:
        seconds: Measured time of a step.
        minutes: Time for everything.
        epochs: Longest pretraining, in epochs.
        steps: Steps of such an epoch.
    """
    left = 60 * minutes - FIXED_SECONDS
    for finetuner, patch_limit, share in ((LONG, 0, 1.0), (SHORT, 0, 1.0), (SHORT, SMALL_PATCH, SMALL_SHARE)):
        own = Lengths(epochs, finetuner, patch_limit, seconds)
        step = seconds * share * STEP_OVERHEAD
        finetuning = 2 * own.finetuning_epochs * (STOCK_STEPS + STOCK_VALIDATION / 3) * step
        affordable = int((left - finetuning) / (step * steps))
        # a long fine-tuning after next to no pretraining shows nothing
        if affordable * steps >= (epochs * steps if finetuner == LONG else MIN_STEPS):
            return replace(own, pretraining_epochs=min(epochs, affordable))
    return replace(own, pretraining_epochs=max(1, affordable, MIN_STEPS // steps))


def quiet_threads() -> dict[str, str]:
    """Return variables that keep idle threads from spinning."""
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] < 0.5 * cores():
        return {}
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}


@dataclass
class Demo:
    """A demonstration.

    Args:
        output: Its folder. Nothing outside is written.
        minutes: Time for everything. Lengths are chosen for it.
        device: ``cpu`` or ``cuda``.
        settings: Words for ``nnssl_ext plan`` after the recipe.
    """

    output: Path
    source: Source
    minutes: float
    device: str = "cpu"
    settings: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> str:
        return "demo_gpu" if self.device == "cuda" else "demo_cpu"

    @property
    def number(self) -> str:
        """Return the data set's number."""
        return str(dataset_number(self.source.dataset))

    @property
    def raw(self) -> Path:
        return self.output / "nnUNet_raw" / self.source.dataset

    @property
    def preprocessed(self) -> Path:
        return self.output / "nnUNet_preprocessed" / self.source.dataset

    def results(self, arm: str) -> Path:
        """Return the fold's folder of ``pretraining``, ``scratch`` or ``pretrained``."""
        trainer, fold = (self.lengths.finetuner, FINETUNING_FOLD)
        if arm == "pretraining":
            trainer, fold = (TRAINERS[METHOD], PRETRAINING_FOLD)
        root = self.output / f"results_{arm}" / self.source.dataset
        return root / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"

    @property
    def weights(self) -> Path:
        return self.results("pretraining") / "checkpoint_final.pth"

    @cached_property
    def chain(self) -> Chain:
        """Return the steps. A step with a result is done."""
        number, plan = self.number, self.preprocessed / f"{PLANS}.json"
        preprocess = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-np", "2"]
        steps = [
            Step(f"Make {self.source.title}", (self.raw / "splits_final.json").exists, action=self._write_raw),
            # stock planning takes nnUNet_n_proc_DA for its number of threads and fails at 0
            Step("Plan and preprocess", self._is_preprocessed, lambda: preprocess, {"nnUNet_n_proc_DA": "2"}),
            Step("Measure a step", self._lengths_file.exists, action=self._measure),
            Step("Derive plans", plan.exists, self._derive_command),
            Step(
                f"Pretrain with {METHODS[METHOD].title}",
                lambda: (self.results("pretraining") / "pretraining_summary.json").exists() and self.weights.exists(),
                self._pretraining_command,
                {"nnUNet_results": str(self.output / "results_pretraining")},
                self._pretraining_epochs,
            ),
            self._finetuning("Fine-tune from scratch", "scratch"),
            self._finetuning("Fine-tune from the pretrained weights", "pretrained"),
        ]
        return Chain(self.output, self._variables(), steps)

    def run(self) -> None:
        """Do every step that is not done.

        Raises:
            UserError: If the folder holds a demonstration with other options.
        """
        with lock_file(self.output / ".lock", f"the demonstration in {self.output}"):
            self._run()

    def _run(self) -> None:
        file, options = self.output / "options.json", self._options()
        before = read_json(file) if file.is_file() else options
        for name, value in options.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.output} holds a demonstration with {name} {before.get(name)!r}, got {value!r}. Give "
                    f"another --output, or remove that folder."
                )
        write_json(options, file)
        keep_memory(self.device)  # the stock trainer, too
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (self.output / name).mkdir(parents=True, exist_ok=True)
        self.chain.run()

    def _options(self) -> dict[str, Any]:
        """Return the options that results depend on."""
        return {
            "data": self.source.title,
            "--labeled": self.source.labeled,
            "--minutes": self.minutes,
            "-device": self.device,
            "settings": self.settings,
        }

    def _variables(self) -> dict[str, str]:
        return {
            "nnUNet_raw": str(self.output / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.output / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.output / "results_pretraining"),
            "nnUNet_extTrainer": str(resource_folder("trainers")),
            "nnUNet_n_proc_DA": "0" if self.device == "cpu" else "4",
            "nnUNet_def_n_proc": "2",
            **quiet_threads(),
        }

    @property
    def _lengths_file(self) -> Path:
        return self.output / "lengths.json"

    @property
    def lengths(self) -> Lengths:
        """Return the lengths that were chosen."""
        return Lengths(**read_json(self._lengths_file))

    def _measure(self) -> None:
        """Time a few steps and choose the lengths."""
        from nnssl_ext.study.estimate import seconds_per_step

        recipe = load_recipe(self.recipe)
        recipes = [recipe, *recipes_of(word for word in self.settings if "=" in word)]
        plans = derive_plans(read_json(self.preprocessed / "nnUNetPlans.json"), PLANS, recipes, [CONFIGURATION])
        dataset_json = read_json(self.preprocessed / "dataset.json")
        seconds = seconds_per_step(plans, CONFIGURATION, dataset_json, CommonSettings(), self.device)
        epochs, steps = (int(recipe.settings[name]) for name in ("epochs", "iterations_per_epoch"))
        lengths = choose_lengths(seconds, self.minutes, epochs, steps)
        if lengths.caution:
            print(lengths.caution, flush=True)
        write_json(asdict(lengths), self._lengths_file)

    def _derive_command(self) -> list[str]:
        own = [f"epochs={self.lengths.pretraining_epochs}"]
        own += [f"configuration.patch_limit={limit}"] if (limit := self.lengths.patch_limit) else []
        words = ["nnssl_ext", "plan", "-d", self.number, "-c", CONFIGURATION, "-o", PLANS, self.recipe]
        return [*words, *own, *self.settings]

    def _write_raw(self) -> None:
        scratch = self.output / "unfinished"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self.source.write_raw(self.raw.parent, scratch)
        shutil.rmtree(scratch)

    def _is_preprocessed(self) -> bool:
        wanted = read_json(self.raw / "dataset.json")["numTraining"] if (self.raw / "dataset.json").exists() else -1
        # stock copies the ground truth last
        folders = {f"nnUNetPlans_{CONFIGURATION}": "*.pkl", "gt_segmentations": "*.nii.gz"}
        return all(len(list((self.preprocessed / name).glob(kind))) == wanted for name, kind in folders.items())

    def _pretraining_epochs(self) -> int:
        words = dict(word.split("=", 1) for word in self.settings if "=" in word)
        return int(words.get("epochs", self.lengths.pretraining_epochs))

    def _train(self, fold: str, trainer: str, *words: str) -> list[str]:
        command = ["nnUNetv2_train", self.number, CONFIGURATION, fold, "-tr", trainer, "-p", PLANS]
        return [*command, "-device", self.device, *words]

    def _pretraining_command(self) -> list[str]:
        begun = list(self.results("pretraining").glob("checkpoint_*.pth"))
        return self._train(PRETRAINING_FOLD, TRAINERS[METHOD], *(["--c"] if begun else []))

    def _finetuning(self, title: str, arm: str) -> Step:
        variables = {
            "nnUNet_results": str(self.output / f"results_{arm}"),
            "nnUNet_n_proc_DA": self._finetuning_workers(),
        }

        def done() -> bool:
            return (self.results(arm) / "validation" / "summary.json").exists()

        def command() -> list[str]:
            words = ["-pretrained_weights", str(self.weights)] if arm == "pretrained" else []
            return self._train(FINETUNING_FOLD, self.lengths.finetuner, *words)

        return Step(title, done, command, variables, lambda: self.lengths.finetuning_epochs)

    def _finetuning_workers(self) -> str:
        return "1" if self.device == "cpu" else "8"  # nnU-Net augments on the CPU
