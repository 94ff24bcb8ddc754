"""Ending early without losing anything: SIGTERM, SIGUSR1 (SLURM's warning) and a time limit.

The run ends after the step it is in, with a checkpoint from which ``--c`` goes on exactly, and exit status 0.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from nnssl_ext.environment import time_limit
from nnssl_ext.training.distributed.ranks import world
from nnssl_ext.training.pretraining.summary import continue_command

if TYPE_CHECKING:
    from nnssl_ext.training.run.folder import Training

#: Processes ask each other whether one of them was told to end once in so many steps.
ASK_EVERY = 8


class Interruption:
    """Whether this run was asked to end. A context manager: within it, signals only ask.

    Args:
        hours: After which it ends by itself, counted from here; None for never.
        device: Of the tensors that processes exchange.
    """

    def __init__(self, hours: float | None, device: torch.device) -> None:
        self.begin, self.device = time.monotonic(), device
        self.hours = time_limit(hours)
        self.signal = ""
        self._earlier: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"Interruption({self.reason or 'none'})"

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            with suppress(TypeError):  # None: a handler that was not set from Python
                signal.signal(number, handler)
        self._earlier.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why this process wants to end, '' if it does not."""
        if self.signal:
            return self.signal
        late = self.hours is not None and time.monotonic() - self.begin >= self.hours * 3600
        return f"the time limit of {self.hours:g} h" if late else ""

    def agreed(self, step: int) -> str:
        """The reason to end now, the same decision in every process."""
        if world() == 1:
            return self.reason
        if step % ASK_EVERY:
            return ""
        wish = torch.tensor(float(bool(self.reason)), device=self.device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        return (self.reason or "another process's signal") if wish.item() else ""


def leave(trainer: Training, reason: str, kept: bool, steps: int) -> NoReturn:
    """End the process with status 0 and the line that says how to go on.

    Args:
        trainer: Between two steps.
        reason: What ``Interruption.agreed`` said.
        kept: Whether a checkpoint of this step was written.
        steps: Of the whole run.
    """
    trainer.print_to_log_file(
        f"Stopped by {reason} after step {trainer.step} of {steps}; "
        f"{'nothing is lost. G' if kept else 'NO CHECKPOINT WAS WRITTEN. G'}o on with:\n    {continue_command(trainer)}"
    )
    trainer.dataloader_train = trainer.dataloader_val = None  # ends the workers
    raise SystemExit(0)
