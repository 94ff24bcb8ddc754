"""A run whose features have collapsed learns nothing any more: it is stopped, with the sign and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnssl_ext.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.training.pretraining.trainer import PretrainingTrainer

KEY = "val_collapsed"


def stop_when_collapsed(trainer: PretrainingTrainer, sign: str, patience: int) -> None:
    """Note in the log whether a validation showed a sign of collapse, and stop after enough in a row.

    The count is read from the log, so that a continued run stops where the uninterrupted one would.

    Args:
        trainer: The trainer, at the end of a validation.
        sign: Of ``Method.check_validation``; '' for a healthy network.
        patience: Of the same.

    Raises:
        UserError: With the sign, after ``patience`` epochs in a row.
    """
    log, epoch = trainer.logger.local_logger.my_fantastic_logging, trainer.current_epoch
    if not sign and KEY not in log:
        return
    log.setdefault(KEY, [0.0] * epoch)
    trainer.logger.log(KEY, float(bool(sign)), epoch)
    if sign:
        trainer.print_to_log_file(f"Sign of a collapse: {sign}")
    if patience and sum(log[KEY][-patience:]) == patience:
        raise UserError(
            f"the features have collapsed ({patience} epochs in a row): {sign}; earlier checkpoints are intact"
        )
