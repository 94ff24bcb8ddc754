from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger

from nnssl_ext.checkpoint import plain
from nnssl_ext.methods import Readable
from nnssl_ext.training.pretraining.log import NEWEST, PlainLog, PretrainingLog, log_means

READABLE = Readable("accuracy", "Accuracy of the task")


def test_any_key_one_value_an_epoch_and_repeats_replace() -> None:
    log = PretrainingLog(READABLE)
    for epoch, value in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0), (1, 5.0)):
        log.log("val_losses", value, epoch)
    assert log.get_value("val_losses", None) == [1.0, 5.0]
    assert log.smoothed_val_loss() == pytest.approx((1 - NEWEST) * 1 + NEWEST * 5)


def test_every_logger_gets_the_objectives(tmp_path: Path) -> None:
    """Such as that of Weights & Biases."""
    logger, other = MetaLogger(str(tmp_path), False), PretrainingLog(READABLE)
    logger.local_logger = PretrainingLog(READABLE)
    logger.loggers.append(other)
    log_means(logger, "val", {"loss": 0.5, "accuracy": 1.0}, 0)
    assert other.my_fantastic_logging == logger.local_logger.my_fantastic_logging
    assert other.get_value("val_losses", None) == [0.5]
    assert other.get_value("val_accuracy", None) == [1.0]


@pytest.mark.draws
def test_picture_with_any_number_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = PretrainingLog(READABLE)
    log.plot_progress_png(str(tmp_path))
    for epoch in range(3):
        for key in ("train_losses", "val_losses", "lrs", "train_dice", "val_dice", "val_accuracy", "val_chance"):
            log.log(key, epoch, epoch)
        log.log("epoch_start_timestamps", epoch, epoch)
        log.log("epoch_end_timestamps", epoch + 1, epoch)
        log.log("val_effective_rank", 2.0 + epoch, epoch)
    assert log.health_text() == "chance 2, effective rank 4"
    drawn: dict[str, list[str]] = {}

    def keep(figure: Any, *_: Any, **__: Any) -> None:
        for axis in figure.axes:
            drawn[axis.get_title()] = [line.get_label() for line in axis.get_lines()]
        savefig(figure, *_, **__)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    log.plot_progress_png(str(tmp_path))
    assert drawn["Accuracy of the task"] == ["validation", "chance"]
    assert drawn["Health, each as a share of its largest"] == ["effective rank / 4"]
    assert drawn["Its terms"] == ["dice, training", "dice, validation"]
    assert (tmp_path / "progress.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", [PlainLog, LocalLogger])
def test_the_moving_average_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path: Path, kind: type[LocalLogger]) -> None:
    dice = np.random.default_rng(0).random(50, np.float32)
    whole, broken = MetaLogger(str(tmp_path), False), MetaLogger(str(tmp_path), False)
    whole.local_logger, broken.local_logger = kind(), kind()
    for epoch, value in enumerate(dice):
        for log in (whole, broken):
            log.log("mean_fg_dice", value, epoch)
        broken.load_checkpoint(plain(broken.get_checkpoint()))
    averages = [log.get_value("ema_fg_dice", None) for log in (whole, broken)]
    # nnU-Net's own does not under numpy 2, where a float32 stays one
    assert (averages[0] == averages[1]) == (kind is PlainLog or np.__version__ < "2")
