"""Validate a fold with nnU-Net's prediction, export and metrics.

Stock starts a pool of processes, which takes longer than a small validation, and always writes into one folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnssl_ext.checkpoint import plain
from nnssl_ext.files import replaced_on_success
from nnssl_ext.training.managed import ManagedTrainer


class _Predictor(nnUNetPredictor):
    """Predict in mixed precision on CPUs too."""

    amp_dtype: torch.dtype | None = None

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            return super()._internal_maybe_mirror_and_predict(x)
        with torch.autocast("cpu", self.amp_dtype, enabled=self.amp_dtype is not None):
            return super()._internal_maybe_mirror_and_predict(x).float()


def evaluate(trainer: ManagedTrainer, cases: nnUNetBaseDataset, folder: Path, mirror: bool) -> float:
    """Predict cases, write them with summary.json and return the mean Dice.

    The trainer's network predicts with the weights that it has now, without deep supervision. On GPUs autocast is
    nnU-Net's own. The mean is over classes and cases.
    """
    plans, configuration, labels = trainer.plans_manager, trainer.configuration_manager, trainer.label_manager
    dataset_json, device, trainer_name = trainer.dataset_json, trainer.device, type(trainer).__name__
    axes = trainer.inference_allowed_mirroring_axes if mirror else None
    folder.mkdir(parents=True, exist_ok=True)
    trainer.network.eval()
    predictor = _Predictor(0.5, True, axes is not None, device.type == "cuda", device, False, False, False)
    predictor.amp_dtype = trainer.amp_dtype
    predictor.manual_initialization(trainer.network, plans, configuration, None, dataset_json, trainer_name, axes)
    truth = Path(str(trainer.preprocessed_dataset_folder_base)) / "gt_segmentations"
    rows = []
    for case in cases.identifiers:
        data, _, previous, properties = cases.load_case(case)
        data = np.array(data[:])
        if trainer.is_cascaded:
            one_hot = convert_labelmap_to_one_hot(previous[:], labels.foreground_labels, output_dtype=data.dtype)
            data = np.vstack((data, one_hot))
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
        export_prediction_from_logits(
            logits, properties, configuration, plans, dataset_json, str(folder / case), False, num_threads_torch=1
        )
        file = f"{case}{dataset_json['file_ending']}"
        rows.append(
            compute_metrics(
                str(truth / file),
                str(folder / file),
                plans.image_reader_writer_class(),
                labels.foreground_regions if labels.has_regions else labels.foreground_labels,
                labels.ignore_label,
            )
        )
        trainer.print_to_log_file(f"{folder.name}: {case}, Dice {_mean(rows[-1]['metrics']):.4f}")
    compute_gaussian.cache_clear()
    summary = plain(_summary(rows))
    # its presence means that the validation is complete
    with replaced_on_success(folder / "summary.json") as temporary:
        save_summary_json(summary, str(temporary))
    return summary["foreground_mean"]["Dice"]


def _mean(metrics: dict) -> float:
    return float(np.nanmean([values["Dice"] for values in metrics.values()]))


def _summary(rows: list[dict]) -> dict:
    """Average metrics over cases and classes, as nnU-Net does."""
    classes = list(rows[0]["metrics"])
    names = list(rows[0]["metrics"][classes[0]])
    mean = {c: {n: float(np.nanmean([row["metrics"][c][n] for row in rows])) for n in names} for c in classes}
    foreground = {n: float(np.nanmean([mean[c][n] for c in classes])) for n in names}
    return {"metric_per_case": rows, "mean": mean, "foreground_mean": foreground}
