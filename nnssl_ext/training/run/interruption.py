"""Detect that a run should end, by signal or time limit.

The run ends after the current step, with a checkpoint from which ``--c`` continues exactly, and exit status 0.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from nnssl_ext.environment import time_limit
from nnssl_ext.signals import EndSignals
from nnssl_ext.training.distributed.ranks import world

#: Steps between two exchanges of wishes among processes.
ASK_EVERY = 8


class Interruption(EndSignals):
    """Note the wish to end a run, within a context.

    Args:
        hours: Time limit, counted from here; None for none. ``--max-time`` takes precedence.
        device: Device of the tensors that processes exchange.
    """

    def __init__(self, hours: float | None, device: torch.device) -> None:
        super().__init__()
        self.begin, self.device = time.monotonic(), device
        self.hours = time_limit(hours)

    @property
    def reason(self) -> str:
        """Return why this process should end, '' without a reason."""
        if self.received:
            return self.received
        late = self.hours is not None and time.monotonic() - self.begin >= self.hours * 3600
        return f"the time limit of {self.hours:g} h" if late else ""

    def agreed(self, step: int) -> str:
        """Return the reason to end, equal in every process."""
        if world() == 1:
            return self.reason
        if step % ASK_EVERY:
            return ""
        wish = torch.tensor(float(bool(self.reason)), device=self.device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        return (self.reason or "another process's signal") if wish.item() else ""
