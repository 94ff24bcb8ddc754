"""What a checkpoint keeps of stock's trainer, and that a run goes on as it began."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from time import time
from typing import Any
from zlib import crc32

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl_ext.commands import RunName
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json
from nnssl_ext.training.optimization import restore_optimizer
from nnssl_ext.training.wrapping import arithmetic, match_memory_format, note_other_arithmetic


class ResumableTrainer(nnUNetTrainer):
    """Keep and restore the state of stock's trainer.

    Attributes:
        step: Finished optimizer steps of the run.
        outputs: What the finished steps of the current epoch returned.
        split_digest: Digest of the cases that this run trains on and validates with, '' before they are known.
        cases_changed: Whether the last ``do_split`` gave other ones.
        seconds_before: Seconds that a continued epoch took before it was stopped.
    """

    amp_dtype: torch.dtype | None
    step: int
    outputs: list[dict[str, Any]]
    split_digest = ""
    cases_changed = False
    seconds_before = 0.0
    _best_ema: float | None

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Return the optimizer steps of the run."""

    @abstractmethod
    def next_epoch(self) -> int:
        """Return the epoch to continue with."""

    def on_epoch_start(self) -> None:
        # an epoch that goes on began earlier
        self.logger.log("epoch_start_timestamps", time() - self.seconds_before, self.current_epoch)
        self.seconds_before = 0.0

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training and the validation cases. Note if the run began with others."""
        self._write_split()
        training, validation = super().do_split()
        # stock lists fold all as the file system does
        parts = [sorted(map(str, part)) for part in (training, validation)]
        digest = f"{crc32(repr(parts).encode()):08x}"
        self.split_digest, before = self.split_digest or digest, self.split_digest or digest
        if digest != before:
            self.print_to_log_file(f"note: {self._other_cases}. Validation cases may have been trained on")
        self.cases_changed = digest != before
        return training, validation

    def _write_split(self) -> None:
        """Write stock's split as a whole, since several folds may start at once."""
        file = Path(str(self.preprocessed_dataset_folder_base)) / "splits_final.json"
        if self.fold == "all" or file.is_file():
            return
        kind = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        cases = sorted(kind.get_identifiers(self.preprocessed_dataset_folder))
        write_json(generate_crossval_split(cases, seed=12345, n_splits=5), file)

    def training_split(self) -> tuple[list[str], list[str]]:
        """Return ``do_split`` for training.

        Raises:
            UserError: If the run would go on with other cases than it began with.
        """
        split = self.do_split()
        if self.cases_changed and self.step < self.total_steps:
            what = "the preprocessed cases" if self.fold == "all" else "splits_final.json and the preprocessed cases"
            raise UserError(f"{self._other_cases}. Restore {what}, or start anew without --c")
        return split

    @property
    def _other_cases(self) -> str:
        return f"fold {self.fold} of {self.run_name.dataset} has other cases than when this run began"

    @property
    def run_name(self) -> RunName:
        """Return the run's name on stock's command line."""
        plans = self.plans_manager
        return RunName(
            plans.dataset_name, self.configuration_name, str(self.fold), plans.plans_name, type(self).__name__
        )

    def stock_state(self) -> dict[str, Any]:
        """Return what stock needs to continue."""
        scaler = self.grad_scaler
        return {
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "arithmetic": arithmetic(self.amp_dtype),
            "split": self.split_digest,
            "epoch_seconds": time() - self.logger.get_value("epoch_start_timestamps", -1) if self.outputs else 0.0,
        }

    def stock_identity(self) -> dict[str, Any]:
        """Return what stock needs to predict."""
        return {
            "init_args": self.my_init_kwargs,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "current_epoch": self.next_epoch(),
        }

    def restore_stock(self, content: dict[str, Any]) -> None:
        """Restore ``stock_state`` and ``stock_identity``, once the weights are restored."""
        note_other_arithmetic(content.get("arithmetic"), self.amp_dtype, self.print_to_log_file)
        restore_optimizer(self.optimizer, content["optimizer_state"])
        match_memory_format(self.optimizer)
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.split_digest, self.seconds_before = content.get("split", ""), content.get("epoch_seconds", 0.0)
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
