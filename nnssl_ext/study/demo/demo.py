"""The demonstration: fine-tuning with and without pretraining on a data set of its own, by stock commands alone.

Everything lies in one folder: an nnUNet_raw and nnUNet_preprocessed of its own, one results folder per arm (arms that
share trainer, plans and fold would overwrite each other), logs, and the page.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnssl_ext.errors import UserError
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.recipe import load_recipe, merged, read_json, write_json
from nnssl_ext.resources import resource_folder
from nnssl_ext.settings import CommonSettings
from nnssl_ext.study.demo.chain import Chain, Step
from nnssl_ext.study.demo.sources import Source

PLANS, CONFIGURATION = "nnUNetPlans_demo", "3d_fullres"
#: Folds of the sources' splits.
FINETUNING_FOLD, PRETRAINING_FOLD = "0", "1"


@dataclass
class Demo:
    """One demonstration.

    Args:
        output: Its folder; nothing outside is written.
        source: The data.
        device: ``cpu`` or ``cuda``.
        method: The pretraining method.
        finetuner: The stock trainer of both arms.
        settings: Words for ``nnssl_ext plan`` after the recipe.
    """

    output: Path
    source: Source
    device: str = "cpu"
    method: str = "volume_fusion"
    finetuner: str = "nnUNetTrainer_5epochs"
    settings: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> str:
        return "demo_gpu" if self.device == "cuda" else "demo_cpu"

    @property
    def trainer(self) -> str:
        return TRAINERS[self.method]

    @property
    def raw(self) -> Path:
        return self.output / "nnUNet_raw" / self.source.dataset

    @property
    def preprocessed(self) -> Path:
        return self.output / "nnUNet_preprocessed" / self.source.dataset

    def results(self, arm: str) -> Path:
        """The fold's folder of ``pretraining``, ``scratch`` or ``pretrained``."""
        trainer, fold = (self.finetuner, FINETUNING_FOLD)
        if arm == "pretraining":
            trainer, fold = (self.trainer, PRETRAINING_FOLD)
        root = self.output / f"results_{arm}" / self.source.dataset
        return root / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"

    @property
    def weights(self) -> Path:
        return self.results("pretraining") / "checkpoint_final.pth"

    @cached_property
    def chain(self) -> Chain:
        """The steps, each done by the presence of its result."""
        number, plan = self.source.number, self.preprocessed / f"{PLANS}.json"
        preprocess = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-np", "2"]
        derive = ["nnssl_ext", "plan", "-d", number, "-c", CONFIGURATION, "-o", PLANS, self.recipe, *self.settings]
        steps = [
            Step(f"Make {self.source.title}", (self.raw / "splits_final.json").exists, action=self._write_raw),
            # stock planning takes nnUNet_n_proc_DA for its number of threads and fails at 0
            Step("Plan and preprocess", self._is_preprocessed, lambda: preprocess, {"nnUNet_n_proc_DA": "2"}),
            Step("Derive plans", plan.exists, lambda: derive),
            Step(
                f"Pretrain with {METHODS[self.method].title}",
                (self.results("pretraining") / "pretraining_summary.json").exists,
                self._pretraining_command,
                {"nnUNet_results": str(self.output / "results_pretraining")},
                self._epochs(),
            ),
            self._finetuning("Fine-tune from scratch", "scratch", []),
            self._finetuning(
                "Fine-tune from the pretrained weights", "pretrained", ["-pretrained_weights", str(self.weights)]
            ),
        ]
        return Chain(self.output, self._variables(), steps)

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            UserError: If the folder holds a demonstration with other options.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        file, options = self.output / "options.json", self._options()
        before = read_json(file) if file.is_file() else options
        for name, value in options.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.output} holds a demonstration with {name} {before.get(name)!r}, this one has {value!r}; "
                    f"give another --output, or remove that folder"
                )
        write_json(options, file)
        keep_memory(self.device)  # the stock trainer, too
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (self.output / name).mkdir(parents=True, exist_ok=True)
        self.chain.run()

    def _options(self) -> dict[str, Any]:
        """What its results depend on."""
        return {
            "data": self.source.title,
            "--labelled": self.source.labelled,
            "-device": self.device,
            "method": self.method,
            "fine-tuner": self.finetuner,
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
        }

    def _write_raw(self) -> None:
        scratch = self.output / "unfinished"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self.source.write_raw(self.raw.parent, scratch)
        shutil.rmtree(scratch)

    def _is_preprocessed(self) -> bool:
        wanted = read_json(self.raw / "dataset.json")["numTraining"] if (self.raw / "dataset.json").exists() else -1
        return len(list((self.preprocessed / f"nnUNetPlans_{CONFIGURATION}").glob("*.pkl"))) == wanted

    def _epochs(self) -> int:
        words = dict(word.split("=", 1) for word in self.settings if "=" in word)
        recipe = load_recipe(self.recipe).settings
        return int(merged({"epochs": CommonSettings().epochs}, {**recipe, **words})["epochs"])

    def _train(self, fold: str, trainer: str, *words: str) -> list[str]:
        command = ["nnUNetv2_train", self.source.number, CONFIGURATION, fold, "-tr", trainer, "-p", PLANS]
        return [*command, "-device", self.device, *words]

    def _pretraining_command(self) -> list[str]:
        begun = list(self.results("pretraining").glob("checkpoint_*.pth"))
        return self._train(PRETRAINING_FOLD, self.trainer, *(["--c"] if begun else []))

    def _finetuning(self, title: str, arm: str, words: list[str]) -> Step:
        done = (self.results(arm) / "validation" / "summary.json").exists
        variables = {
            "nnUNet_results": str(self.output / f"results_{arm}"),
            "nnUNet_n_proc_DA": self._finetuning_workers(),
        }
        epochs = int("".join(character for character in self.finetuner if character.isdigit()) or 1000)
        return Step(title, done, lambda: self._train(FINETUNING_FOLD, self.finetuner, *words), variables, epochs)

    def _finetuning_workers(self) -> str:
        return "1" if self.device == "cpu" else "8"  # nnU-Net augments on the CPU
