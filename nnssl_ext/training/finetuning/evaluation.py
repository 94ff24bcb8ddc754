"""A fold's validation with nnU-Net's own prediction, export and metrics, case by case in this process.

Stock's starts a pool of processes, which for many small validations takes longer than they do, and always writes into
one folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnssl_ext import checkpoint
from nnssl_ext.checkpoint import plain
from nnssl_ext.files import replaced_on_success
from nnssl_ext.training.finetuning.components import OtherWeights

if TYPE_CHECKING:
    from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune


class _Predictor(nnUNetPredictor):
    """nnU-Net's, which on GPUs computes in mixed precision; this one does so on CPUs too, as the training did."""

    amp_dtype: torch.dtype | None = None

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            return super()._internal_maybe_mirror_and_predict(x)
        with torch.autocast("cpu", self.amp_dtype, enabled=self.amp_dtype is not None):
            return super()._internal_maybe_mirror_and_predict(x).float()


def validate_snapshots(trainer: nnsslTrainer_Finetune) -> None:
    """Validate each of a fine-tuning's snapshots in a folder of its own, and its end as stock does."""
    folder, settings = Path(trainer.output_folder), trainer.settings
    final = trainer.exported_weights()
    for step in settings.snapshots:
        if step == settings.steps or not trainer.snapshot_file(step).is_file():
            continue
        weights = checkpoint.load(trainer.snapshot_file(step))["network_weights"]
        with OtherWeights(trainer.plain_network, weights):
            validate(trainer, folder / f"validation_step_{step:06d}", settings.mirroring)
    with OtherWeights(trainer.plain_network, final):
        dice = validate(trainer, folder / "validation", settings.mirroring)
    trainer.print_to_log_file(f"Mean Validation Dice: {dice}")


def validate(trainer: nnsslTrainer_Finetune, folder: Path, mirroring: bool) -> float:
    """Predict the fold's validation cases with the trainer's network and write them and summary.json as stock does.

    Args:
        trainer: Initialised; its network is used as it is, in the precision of its training (on GPUs as nnU-Net does).
        folder: Where to.
        mirroring: Average over mirrored predictions.

    Returns:
        The mean Dice over classes and cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = _Predictor(0.5, True, mirroring, trainer.device.type == "cuda", trainer.device, False, False, False)
    predictor.amp_dtype = trainer.amp_dtype
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    predictor.manual_initialization(
        trainer.network,
        plans,
        configuration,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    _, cases = trainer.do_split()
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder, cases, trainer.folder_with_segs_from_previous_stage
    )
    rows = []
    for case in dataset.identifiers:
        data, _, previous, properties = dataset.load_case(case)
        data = _with_previous_stage(trainer, data[:], previous)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
        export_prediction_from_logits(
            logits,
            properties,
            configuration,
            plans,
            trainer.dataset_json,
            str(folder / case),
            False,
            num_threads_torch=1,
        )
        rows.append(_metrics(trainer, folder, case))
        trainer.print_to_log_file(f"{folder.name}: {case}, Dice {_mean(rows[-1]['metrics']):.4f}")
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    compute_gaussian.cache_clear()
    summary = plain(_summary(rows))
    # its presence means that the validation is complete
    with replaced_on_success(folder / "summary.json") as temporary:
        save_summary_json(summary, str(temporary))
    return summary["foreground_mean"]["Dice"]


def _with_previous_stage(trainer: nnsslTrainer_Finetune, data: np.ndarray, previous: Any) -> np.ndarray:
    if not trainer.is_cascaded:
        return np.array(data)
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    one_hot = convert_labelmap_to_one_hot(previous[:], trainer.label_manager.foreground_labels, output_dtype=data.dtype)
    return np.vstack((data, one_hot))


def _metrics(trainer: nnsslTrainer_Finetune, folder: Path, case: str) -> dict:
    labels, ending = trainer.label_manager, trainer.dataset_json["file_ending"]
    truth = Path(str(trainer.preprocessed_dataset_folder_base)) / "gt_segmentations" / f"{case}{ending}"
    return compute_metrics(
        str(truth),
        str(folder / f"{case}{ending}"),
        trainer.plans_manager.image_reader_writer_class(),
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
    )


def _mean(metrics: dict) -> float:
    return float(np.nanmean([values["Dice"] for values in metrics.values()]))


def _summary(rows: list[dict]) -> dict:
    """nnU-Net's summary: per case, the mean over cases, and the mean over classes."""
    classes = list(rows[0]["metrics"])
    names = list(rows[0]["metrics"][classes[0]])
    mean = {c: {n: float(np.nanmean([row["metrics"][c][n] for row in rows])) for n in names} for c in classes}
    foreground = {n: float(np.nanmean([mean[c][n] for c in classes])) for n in names}
    return {"metric_per_case": rows, "mean": mean, "foreground_mean": foreground}
