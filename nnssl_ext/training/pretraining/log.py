"""Log pretraining and fine-tuning, in the place of nnU-Net's logger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger

from nnssl_ext.checkpoint import plain
from nnssl_ext.methods import Readable

#: Measures that show a collapse, where a method has them. They have a panel of their own.
HEALTH = (
    "feature_deviation",
    "effective_rank",
    "off_diagonal_cosine",
    "image_entropy",
    "patch_entropy",
    "image_information",
    "patch_information",
)
#: Weight of the newest epoch in the moving average that chooses checkpoint_best.
NEWEST = 0.3
#: Whether a validation showed a sign of collapse.
COLLAPSED = "val_collapsed"


class PlainLog(LocalLogger):
    """Log plain Python numbers for nnU-Net.

    nnU-Net keeps its moving average of the Dice in float32 until a checkpoint is read. After ``--c`` it would be
    rounded differently, and another epoch could be the best.
    """

    def log(self, key: str, value: Any, epoch: int) -> None:
        super().log(key, plain(value), epoch)


def log_means(logger: MetaLogger, prefix: str, means: Mapping[str, float], epoch: int) -> None:
    """Log the means of an epoch, to Weights & Biases too.

    ``loss`` is named as in nnU-Net, others ``PREFIX_NAME``.
    """
    for key, value in means.items():
        logger.log(f"{prefix}_losses" if key == "loss" else f"{prefix}_{key}", float(value), epoch)


class PretrainingLog(LocalLogger):
    """Keep one float per epoch and key, for any key. Checkpoints then need no pickles."""

    def __init__(self, readable: Readable) -> None:
        super().__init__()
        self.readable = readable
        self.my_fantastic_logging: dict[str, list[float]] = {
            key: [] for key in ("train_losses", "val_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps")
        }

    def log(self, key: str, value: float, epoch: int) -> None:
        values = self.my_fantastic_logging.setdefault(key, [])
        # a resumed run may repeat the epoch it was killed in
        del values[epoch:]
        super().log(key, float(value), epoch)

    def has_collapsed(self, sign: bool, patience: int, epoch: int) -> bool:
        """Log a sign of collapse. Return whether to stop.

        That is when ``patience`` validations in a row showed one; 0 is never. The count is read from the log, so that a
        continued run stops where the uninterrupted one would.
        """
        log = self.my_fantastic_logging
        if not sign and COLLAPSED not in log:
            return False
        log.setdefault(COLLAPSED, [0.0] * epoch)
        self.log(COLLAPSED, float(sign), epoch)
        return bool(patience) and sum(log[COLLAPSED][-patience:]) == patience

    def smoothed_val_loss(self) -> float:
        """Return the moving average of the validation objective. Its minimum marks checkpoint_best."""
        average, *rest = self.my_fantastic_logging["val_losses"]
        for value in rest:
            average = (1 - NEWEST) * average + NEWEST * value
        return average

    def health_text(self) -> str:
        """Describe chance and health of the newest epoch."""
        log = self.my_fantastic_logging
        found = {name: log[f"val_{name}"][-1] for name in ("chance", *HEALTH) if log.get(f"val_{name}")}
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw progress.png.

        It shows objective, terms, readable measure and chance, health, learning rate and epoch times.
        """
        log = self.my_fantastic_logging
        terms = sorted(k.removeprefix("val_") for k in log if k.startswith("val_") and k != "val_losses")
        terms = [term for term in terms if term not in (self.readable.key, "chance", "samples", *HEALTH)]
        figure, axes = plt.subplots(2, 3, figsize=(19, 9), constrained_layout=True)
        objective, parts, readable, health, rate, unused = axes.flat
        unused.remove()
        objective.plot(log["train_losses"], color="tab:blue", label="training")
        objective.plot(log["val_losses"], color="tab:red", label="validation")
        objective.set(title="Objective", ylabel="loss")
        for number, term in enumerate(terms):
            color = f"C{number}"
            parts.plot(log.get(f"train_{term}", []), color=color, linestyle=":", label=f"{term}, training")
            parts.plot(log[f"val_{term}"], color=color, label=f"{term}, validation")
        parts.set(title="Its terms")
        readable.plot(log.get(f"val_{self.readable.key}", []), color="tab:green", label="validation")
        readable.plot(log.get("val_chance", []), color="tab:gray", linestyle="--", label="chance")
        readable.set(title=self.readable.title)
        for name in HEALTH:
            if f"val_{name}" in log:
                values = log[f"val_{name}"]
                largest = max(map(abs, values), default=0.0)
                shown = [value / largest for value in values] if largest else values
                health.plot(shown, label=f"{name.replace('_', ' ')} / {largest:.3g}")
        health.set(title="Health, each as a share of its largest")
        rate.plot(log["lrs"], color="tab:purple", label="learning rate")
        rate.set(title="Learning rate and epoch time", ylabel="learning rate")
        starts, ends = log["epoch_start_timestamps"], log["epoch_end_timestamps"]
        times = [end - start for start, end in zip(starts, ends, strict=False)]
        seconds = rate.twinx()
        seconds.plot(times, color="tab:gray", linestyle="--", label="seconds an epoch")
        seconds.set_ylabel("s")
        seconds.set_ylim(bottom=0)
        for axis in (objective, parts, readable, health, rate):
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            lines, labels = axis.get_legend_handles_labels()
            if axis is rate:
                more, names = seconds.get_legend_handles_labels()
                lines, labels = lines + more, labels + names
            if lines:
                axis.legend(lines, labels, fontsize="small")
        figure.savefig(Path(output_folder) / "progress.png", dpi=80)
        plt.close(figure)
