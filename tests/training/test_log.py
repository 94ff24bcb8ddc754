from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger

from nnssl_ext.checkpoint import plain
from nnssl_ext.methods import Readable
from nnssl_ext.training.log import NEWEST, PlainLog, PretrainingLog

READABLE = Readable("accuracy", "Accuracy of the task")


def test_any_key_one_value_an_epoch_and_repeats_replace() -> None:
    log = PretrainingLog(READABLE)
    for epoch, value in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0), (1, 5.0)):
        log.log("val_losses", value, epoch)
    assert log.get_value("val_losses", None) == [1.0, 5.0]
    assert log.smoothed_val_loss() == pytest.approx((1 - NEWEST) * 1 + NEWEST * 5)


def test_picture_with_any_number_of_epochs(tmp_path: Path) -> None:
    log = PretrainingLog(READABLE)
    log.plot_progress_png(str(tmp_path))
    for epoch in range(3):
        for key in ("train_losses", "val_losses", "lrs", "train_dice", "val_dice", "val_accuracy"):
            log.log(key, epoch, epoch)
        log.log("epoch_start_timestamps", epoch, epoch)
        log.log("epoch_end_timestamps", epoch + 1, epoch)
    log.plot_progress_png(str(tmp_path))
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
    # nnU-Net's own does not
    assert (averages[0] == averages[1]) == (kind is PlainLog)
