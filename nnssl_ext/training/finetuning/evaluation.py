"""Validate a fold with nnU-Net's prediction, export and metrics.

Stock starts a pool of processes, which takes longer than a small validation, and always writes into one folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl_ext.checkpoint import plain
from nnssl_ext.files import replaced_on_success


class _Predictor(nnUNetPredictor):
    """Predict in the arithmetic of the training. Stock takes float16 on GPUs, and float32 on CPUs."""

    amp_dtype: torch.dtype | None = None

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return super()._internal_maybe_mirror_and_predict(x).float()


@dataclass(frozen=True)
class Evaluation:
    """The validation of a fold.

    Attributes:
        network: Predicts with the weights that it has when ``run`` is called, without deep supervision.
        plans, configuration, labels, dataset_json: nnU-Net's of the data set.
        trainer_name: Name of the trainer.
        mirroring_axes: Axes over whose mirrored predictions is averaged; None for no mirroring.
        device: Device of the network.
        amp_dtype: Type of autocast; None is float32.
        cases: The validation cases.
        truth: Folder of their segmentations.
        is_cascaded: Whether the input holds the segmentation of a previous stage.
        log: Called with a line for each case.
    """

    network: nn.Module
    plans: PlansManager
    configuration: ConfigurationManager
    labels: LabelManager
    dataset_json: dict
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    device: torch.device
    amp_dtype: torch.dtype | None
    cases: Any
    truth: Path
    is_cascaded: bool
    log: Callable[[str], None]

    def run(self, folder: Path) -> float:
        """Predict the cases and write them with summary.json.

        Returns:
            The mean Dice over classes and cases.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.network.eval()
        mirroring = self.mirroring_axes is not None
        predictor = _Predictor(0.5, True, mirroring, self.device.type == "cuda", self.device, False, False, False)
        predictor.amp_dtype = self.amp_dtype
        predictor.manual_initialization(
            self.network,
            self.plans,
            self.configuration,
            None,
            self.dataset_json,
            self.trainer_name,
            self.mirroring_axes,
        )
        rows = []
        for case in self.cases.identifiers:
            data, _, previous, properties = self.cases.load_case(case)
            data = self._with_previous_stage(data[:], previous)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
            export_prediction_from_logits(
                logits,
                properties,
                self.configuration,
                self.plans,
                self.dataset_json,
                str(folder / case),
                False,
                num_threads_torch=1,
            )
            rows.append(self._metrics(folder, case))
            self.log(f"{folder.name}: {case}, Dice {_mean(rows[-1]['metrics']):.4f}")
        compute_gaussian.cache_clear()
        summary = plain(_summary(rows))
        # its presence means that the validation is complete
        with replaced_on_success(folder / "summary.json") as temporary:
            save_summary_json(summary, str(temporary))
        return summary["foreground_mean"]["Dice"]

    def _with_previous_stage(self, data: np.ndarray, previous: Any) -> np.ndarray:
        if not self.is_cascaded:
            return np.array(data)
        labels = self.labels.foreground_labels
        return np.vstack((data, convert_labelmap_to_one_hot(previous[:], labels, output_dtype=data.dtype)))

    def _metrics(self, folder: Path, case: str) -> dict:
        labels, ending = self.labels, self.dataset_json["file_ending"]
        return compute_metrics(
            str(self.truth / f"{case}{ending}"),
            str(folder / f"{case}{ending}"),
            self.plans.image_reader_writer_class(),
            labels.foreground_regions if labels.has_regions else labels.foreground_labels,
            labels.ignore_label,
        )


def _mean(metrics: dict) -> float:
    return float(np.nanmean([values["Dice"] for values in metrics.values()]))


def _summary(rows: list[dict]) -> dict:
    """Average metrics over cases and classes, as nnU-Net does."""
    classes = list(rows[0]["metrics"])
    names = list(rows[0]["metrics"][classes[0]])
    mean = {c: {n: float(np.nanmean([row["metrics"][c][n] for row in rows])) for n in names} for c in classes}
    foreground = {n: float(np.nanmean([mean[c][n] for c in classes])) for n in names}
    return {"metric_per_case": rows, "mean": mean, "foreground_mean": foreground}
